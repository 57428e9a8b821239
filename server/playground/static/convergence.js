// Which tokens of a text were fast-forwarded or stationary, from what each step accepted and the draft it left.
//
// fast-forwarded: accepted beyond the first token of a step. stationary: stood in an earlier draft at its place, while
// something before it there was still wrong.

const REMEMBERED = 64; // drafts with something wrong in them

export class Convergence {
  #length = 0; // characters accepted so far
  #draft = ""; // of the last step, from there on
  #wrong = []; // {start, text}: earlier drafts behind their first wrong character

  /** Takes a step; returns the tokens it accepted as {text, kind}. */
  step(tokens, draft) {
    const start = this.#length;
    const text = tokens.join("");
    this.#remember(start, text);
    let place = start;
    const marked = tokens.map((token, index) => {
      const kind = this.#wasThere(place, token) ? "stationary" : index ? "fast" : "accepted";
      place += token.length;
      return { text: token, kind };
    });
    this.#length = place;
    if (draft !== null) this.#draft = draft;
    return marked;
  }

  #remember(start, text) {
    const draft = this.#draft;
    let same = 0;
    while (same < draft.length && same < text.length && draft[same] === text[same]) same++;
    if (same < text.length && same < draft.length) {
      this.#wrong.push({ start: start + same, text: draft.slice(same) });
      if (this.#wrong.length > REMEMBERED) this.#wrong.shift();
    }
    this.#draft = draft.slice(text.length);
  }

  #wasThere(place, token) {
    return token.trim() !== "" && this.#wrong.some(
      ({ start, text }) => place > start && text.slice(place - start, place - start + token.length) === token,
    );
  }
}
