"""Whether two SQL queries mean the same, judged by running both on generated databases. No torch in here."""
