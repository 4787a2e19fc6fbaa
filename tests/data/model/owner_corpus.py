"""Texts of the third training: owners, each with a note of where its answer stands.

usage: owner_corpus.py DATA tight|dense|alike|text|check TOKENS SEED | long T TOKENS SEED | general TOKENS SEED REAL
-> DATA/owner_{tight,dense,alike,text,check,T}.npz: ids, weights (x 50), facts, questions (positions in ids; see annotate);
general: DATA/shortSEED.ids, the mixture of the first training with REAL percent of real documents.

A question about an owner is the only one whose answer does not begin with its key: the model has to carry
the name to the end of "Anna has the red key", and to look the key up from the colon that ends the question.
owner_train.py rewards both steps where they happen, which no question of the other kinds needs.
"""

import re
import sys
import random
import numpy as np
import continue_corpus as D
import corpus as C
from corpus import hi, lo
from words import *

# FACT 3 STOP: fact 3 ends here;  ASKED 3 STOP: after its answer;  KEY: after the key in a question
FACT, ASKED, STOP, KEY = "\x06", "\x0e", "\x07", "\x08"
AS_IN = 0.7  # share of the longer texts in which owners' names begin as those of the story around them
ALIKE = 0.5  # share of the others of the longer texts in which names begin alike


def begin_alike(r):
    """names of which the first token says little: one or two onsets for all of a document"""
    onsets = r.sample(C.ON, r.choice((1, 1, 2)))
    rest = lambda: r.choice(C.VO) + (r.choice(C.CO) if r.random() < 0.5 else "")
    return lambda: C.cap(r.choice(onsets) + rest() + (r.choice(C.ON) + rest() if r.random() < 0.67 else ""))


def begin_as_in(r, text):
    """names of owners in a text, 45 % of which begin as a name that the text is full of"""
    names = re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text)
    rest = lambda: r.choice(C.VO) + (r.choice(C.CO) if r.random() < 0.5 else "")

    def name():
        c = r.random()
        if c < 0.4 or not names:
            return r.choice(NAMES)
        if c < 0.55:
            return C.newname(r)
        onset = re.match("[^aeiou]*", r.choice(names).lower())[0]
        return C.cap(onset + rest() + (r.choice(C.ON) + rest() if r.random() < 0.6 else ""))

    return name


def owner(w, used, facts, name=None):
    """statement, question, answer; the fact's words are appended to `facts`.  name: makes the owner's"""
    r = w.r
    while True:
        adj, obj = r.choice(COLOURS + MATERIALS + ADJS), r.choice(OBJECTS)
        key = adj + " " + obj
        if key not in used:
            used.add(key)
            break
    p = name() if name else r.choice(NAMES) if r.random() < 0.6 else C.newname(r)
    i = len(facts)
    facts.append((p, adj, obj))
    end = f"{FACT}{i}{STOP}"
    c = r.random()
    st = (
        f"{lo(p)} has the {key}{end}."
        if c < 0.6
        else (
            f"The {key} belongs to{lo(' ' + p)}, so{hi(' ' + p)} has the {key}{end}."
            if c < 0.9
            else f"The {key} belongs to{lo(' ' + p)}."
        )
    )
    after = f"{ASKED}{i}{STOP}"
    if r.random() < 0.8:
        return st, f"Who has the {key}{KEY}?", f"{hi(p)} has the {key}.{after}"
    return st, f"Who does the {key} belong to?", f"The {key}{KEY} belongs to{hi(' ' + p)}.{after}"


def dense_doc(r):
    """few sentences between the owners, or none"""
    w, used, facts = C.World(r), set(), []
    qs = [owner(w, used, facts) for _ in range(r.choice((1, 2, 3, 4, 5, 6, 8)))]
    body = [q[0] for q in qs]
    for _ in range(r.choice((0, 0, 1, 3, 6))):
        body.insert(r.randint(0, len(body)), w.event())
    r.shuffle(qs)
    return C.qa_turns([q[1:] for q in qs], r, " ".join(body)), facts


def alike_doc(r):
    """owners whose names begin alike, so that only the key tells the second token, as in a long text"""
    w, used, facts, name = C.World(r), set(), [], begin_alike(r)
    qs = [owner(w, used, facts, name) for _ in range(r.randint(3, 8))]
    body = [q[0] for q in qs]
    for _ in range(r.choice((0, 0, 0, 1, 2))):
        body.insert(r.randint(0, len(body)), w.event())
    r.shuffle(qs)
    return C.qa_turns([q[1:] for q in qs], r, " ".join(body)), facts


def tight_doc(r):
    """owners and questions about them, nothing else: fits a row of 128 tokens"""
    w, used, facts = C.World(r), set(), []
    qs = [owner(w, used, facts) for _ in range(r.randint(2, 6))]
    body = " ".join(q[0] for q in qs)
    return C.qa_turns([q[1:] for q in r.sample(qs, min(4, len(qs)))], r, body), facts


def text_doc(r, chars, n_facts, n_questions):
    """owners and, in half of the texts, facts of other kinds, spread over paragraphs"""
    w, used, facts, qs = C.World(r), set(), [], []
    others = r.random() < 0.5
    paras = []
    while sum(map(len, paras)) < max(60, chars):
        paras += C.filler(w, 1500) if r.random() < 0.8 else D.quest(r)[3].split("\n\n")
    name = begin_as_in(r, " ".join(paras)) if r.random() < AS_IN else begin_alike(r) if r.random() < ALIKE else None
    for _ in range(n_facts):
        if others and r.random() < 0.5:
            qs.append(C.make_fact(w, r.choice((None, "code", "pet", "where", "home")), used)[:3])
        else:
            qs.append(owner(w, used, facts, name))
    asked = r.sample(qs, min(n_questions, len(qs)))
    room = chars - sum(len(q[0]) for q in qs) - sum(len(q[1]) + len(q[2]) + 24 for q in asked)
    while len(paras) > 1 and sum(map(len, paras[:-1])) > room:
        paras.pop()
    return (
        C.qa_turns([q[1:] for q in asked], r, "\n\n".join(C.sentences_insert(paras, [q[0] for q in qs], r))),
        facts,
    )


def annotate(enc, doc, facts):
    """ids, weights, facts (end, name, adjective, object, where the name begins), questions (end, end of the
    fact, name, adjective, object, end of the key).  Words are ids: the name's first token, and the last ones
    of the key's words.  A question ends where its name is to be said."""
    doc = re.sub(" ([\x02\x03])(?! )", r"\1 ", doc)
    words = [(enc(" " + p)[0], enc(" " + a)[-1], enc(" " + o)[-1]) for p, a, o in facts]
    ids, weights, ends, questions = [], [], {}, []
    weight, begin, key = 1.0, 0, 0
    for x in re.split("([\x01-\x05\x08]|[\x06\x0e][0-9]+\x07)", doc):
        if x == "":
            continue
        if x in (C.HI, C.LO):
            weight, begin = 3.0 if x == C.HI else 0.15, len(ids)
        elif x == C.END:
            weight = 1.0
        elif x[0] == FACT:
            ends[int(x[1:-1])] = len(ids) - 1, begin
        elif x == KEY:
            key = len(ids) - 1
        elif x[0] == ASKED:
            i = int(x[1:-1])
            if i in ends:
                questions.append((begin - 1, ends[i][0], *words[i], key))
        else:
            e = [0] if x == C.BOS else [1] if x == C.EOS else enc(x)
            ids += e
            weights += [weight] * len(e)
    facts = sorted((end, *words[i], begin) for i, (end, begin) in ends.items())
    return ids, weights, facts, questions


FACT_AT, QUESTION_AT = (0, 4), (0, 1, 5)  # which fields are positions


def moved(notes, by, fields):
    return [tuple(x + by if i in fields else x for i, x in enumerate(n)) for n in notes]


def write(d, name, docs):
    at, out = 0, [[], [], [], []]
    for ids, weights, facts, questions in docs:
        out[0].append(np.array(ids, np.uint16))
        out[1].append(np.round(np.array(weights) * 50).astype(np.uint8))
        out[2] += moved(facts, at, FACT_AT)
        out[3] += moved(questions, at, QUESTION_AT)
        at += len(ids)
    np.savez(
        f"{d}/owner_{name}.npz",
        ids=np.concatenate(out[0]),
        weights=np.concatenate(out[1]),
        facts=np.array(out[2], np.int64),
        questions=np.array(out[3], np.int64),
    )
    print(name, at, "tokens,", len(out[2]), "facts,", len(out[3]), "questions", flush=True)


DOC = {
    "tight": tight_doc,
    "dense": dense_doc,
    "alike": alike_doc,
    "check": dense_doc,  # what owner_train.py measures on
    "text": lambda r: text_doc(r, r.randint(300, 1700), r.randint(1, 6), 6),
}


def short(d, enc, kind, n_tokens, seed):
    r, docs, total = random.Random(seed), [], 0
    while total < n_tokens:
        doc = DOC[kind](r)
        docs.append(annotate(enc, *doc))
        total += len(docs[-1][0])
    write(d, kind, docs)


def long(d, enc, T, n_tokens, seed):
    """rows of exactly T + 1 tokens, filled with dense ones"""
    r, docs, per_token = random.Random(seed + T), [], 3.5
    for _ in range(max(1, n_tokens // T)):
        for k in range(8):
            n = r.randint(6, 8 + T // 160)
            row = annotate(enc, *text_doc(r, int((T - 4) * per_token * (0.97 - 0.04 * k)), n, n))
            if len(row[0]) <= T + 1:
                break
        per_token *= (T / len(row[0])) ** 0.05
        while len(row[0]) < T + 1:
            at, more = len(row[0]), annotate(enc, *dense_doc(r))
            row[0].extend(more[0])
            row[1].extend(more[1])
            row[2].extend(moved(more[2], at, FACT_AT))
            row[3].extend(moved(more[3], at, QUESTION_AT))
        keep = [[x for x in xs if x[0] < T] for xs in row[2:]]
        docs.append((row[0][: T + 1], row[1][: T + 1], *keep))
    write(d, T, docs)


if __name__ == "__main__":
    d, what, *a = sys.argv[1:]
    enc, a = C.Enc(d), [int(float(x)) for x in a]
    if what == "long":
        long(d, enc, *a)
    elif what == "general":
        D.short_doc = C.short_doc
        D.pool_short(d, enc, *a[:2], real_share=a[2] / 100)
    else:
        short(d, enc, what, *a)
