for d in 0 1 2 3; do echo "D $d"; python -u /tmp/nk/prof/run.py $d | paste -sd' ' | sed 's/---/\n---/g'; done
