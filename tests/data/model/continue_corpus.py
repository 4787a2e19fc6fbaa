"""Texts of the second training: owners asked for (`who`), stories that go somewhere, long retrieval.

usage: python continue_corpus.py DIR short SEED TOKENS [REAL_SHARE] | who SEED DOCUMENTS | long T TOKENS SEED |
       stories | talk SEED TOKENS
Builds on corpus.py (markers, World, make_fact, pools).  DIR holds tokenizer.json.
"""

import random
import re
import sys
import numpy as np
import corpus as C
from corpus import BOS, EOS, an, cap, hi, lo, inpl
from words import *


# ---- owners: the value stands before its key -----------------------------------------------------
def who_fact(w, used, forward):
    """statement, question, answer.  forward: the statement names the thing first (the easy order)."""
    r = w.r
    while True:
        key = r.choice(COLOURS + MATERIALS + ADJS) + " " + r.choice(OBJECTS)
        if key not in used:
            used.add(key)
            break
    p = r.choice(HELD_NAMES) if w.held else r.choice(NAMES) if r.random() < 0.6 else C.newname(r)
    if forward:
        st = r.choice(
            (
                f"The {key} belongs to{lo(' ' + p)}.",
                f"The {key} belongs to{lo(' ' + p)}, so{hi(' ' + p)} has the {key}.",
            )
        )
    else:
        st = f"{lo(p)} has the {key}."
    if r.random() < 0.75:
        return st, f"Who has the {key}?", f"{hi(p)} has the {key}."
    return st, f"Who does the {key} belong to?", f"The {key} belongs to{hi(' ' + p)}."


def who_doc(r, n_facts=None, n_filler=None):
    w = C.World(r)
    used = set()
    n = n_facts or r.randint(2, 8)
    share = r.choice((0, 0, 0.3, 0.6))
    fs = [who_fact(w, used, r.random() < share) for _ in range(n)]
    body = [f[0] for f in fs]
    for _ in range(r.randint(0, 6) if n_filler is None else n_filler):
        body.insert(r.randint(0, len(body)), w.event())
    if r.random() < 0.3:
        f = C.make_fact(w, None, used)
        fs.append(f[:3])
        body.insert(r.randint(0, len(body)), f[0])
    order = fs * r.choice((1, 2))
    r.shuffle(order)
    return C.qa_turns([(f[1], f[2]) for f in order], r, " ".join(body))


def dense_who_doc(r):
    """nothing but owners, nearly all named before the thing"""
    w = C.World(r)
    used = set()
    fs = [who_fact(w, used, r.random() < 0.1) for _ in range(r.choice((1, 2, 3, 4, 6, 8)))]
    body = [f[0] for f in fs]
    if r.random() < 0.3:
        body.insert(r.randint(0, len(body)), w.event())
    r.shuffle(order := list(fs))
    return C.qa_turns([(f[1], f[2]) for f in order], r, " ".join(body))


# ---- stories with a beginning, a middle and an end: each paragraph leads to the next -------------
def quest(r, held=False):
    """-> title person, text.  The names and things of a story stay the same through it."""
    w = C.World(r, held)
    nm = HELD_NAMES if held else NAMES
    p, q, s = r.sample(nm, 3)
    f = lambda n: n in C.FEM
    he, his, him = ("she", "her", "her") if f(p) else ("he", "his", "him")
    job = r.choice(JOBS)
    adj, adj2 = r.sample(PADJ, 2)
    home, a, b, c = r.sample([x for x in PLACES if x not in ("balcony", "well", "deck", "pantry")], 4)
    o = r.choice(ADJS + COLOURS + MATERIALS) + " " + r.choice(OBJECTS)
    food, food2 = r.sample(FOODS, 2)
    pet = r.choice(ANIMALS[:8])
    beast = r.choice(ANIMALS[8:])
    v = r.choice(VEHICLES)
    P = []
    P.append(
        r.choice(
            (
                f"Once upon a time there was {an(adj)} {job} called {p}. {cap(he)} lived in a small house near the {home} with {his} {pet}.",
                f"{p} was {an(adj)} {job}. {cap(he)} lived near the {home}, and {his} best friend was {q}.",
                f"There was once {an(adj)} {job} whose name was {p}. {cap(he)} had {an(o)}, and {he} loved it more than anything else.",
            )
        )
        + " "
        + r.choice(
            (
                f"Every morning {he} ate some {food} and went to work.",
                f"{cap(he)} was a good {job}, and everyone liked {him}.",
                f"The people of the village often came to {him} for help.",
            )
        )
    )
    k = r.randrange(5)
    if k == 0:  # lost and found
        P.append(
            f'One day the {o} was gone. {p} looked under the bed and behind the door, but it was not there. "Where is my {o}?" {he} asked. Nobody knew.'
        )
        P.append(
            f'So {p} went to {q}. "Have you seen my {o}?" asked {p}. "No," said {q}, "but I will help you to look for it." They took some {food} and set out together.'
        )
        P.append(
            f"First they looked {inpl(a)}, but they found only {an(beast)}. Then they looked {inpl(b)}, but it was dark and empty. {p} began to lose hope."
        )
        P.append(
            f'At last they came to the {c}. There sat {s} with the {o}. "I found it on the road," said {s}. "I did not know that it was yours." {s} gave it back at once.'
        )
        P.append(
            r.choice(
                (
                    f"{p} thanked {s} and gave everyone some {food2}. From that day on the three were good friends.",
                    f"{p} was so happy that {he} danced all the way home. That night {he} put the {o} in a safe place.",
                )
            )
        )
    elif k == 1:  # an animal in need
        P.append(
            f'One cold morning {p} heard a noise {inpl(a)}. It was {an(beast)}, and it could not walk. "Poor thing," said {p}. "You must be hungry."'
        )
        P.append(
            f'{p} carried it home, gave it some {food} and made a warm bed for it. But it did not eat. "What shall I do?" {he} thought.'
        )
        P.append(
            f'Then {p} remembered {q}, who knew everything about animals. {cap(he)} took the {v} to the {b} and knocked at the door. "Give it some {food2} and let it sleep," said {q}.'
        )
        P.append(
            f"{p} did so. The next day the {beast} opened its eyes and ate all of the {food2}. After a week it could walk again, and after two weeks it could run."
        )
        P.append(
            r.choice(
                (
                    f"In spring {p} took it back to the {a} and let it go. It looked back once and was gone. But every year it came to see {him}.",
                    f"The {beast} did not want to leave. It stayed with {p}, and they were never lonely again.",
                )
            )
        )
    elif k == 2:  # something to build or mend
        P.append(
            f'One evening a storm came over the {home}. The wind blew all night, and in the morning the roof of the {a} was broken. "Who will repair it?" asked the people.'
        )
        P.append(
            f'"I will try," said {p}. But {he} had no wood and no tools. {q} brought a saw, and {s} brought a hammer. All they needed now was wood.'
        )
        P.append(
            f'They took the {v} to the {b} and asked for some. "You may have it," said the old {r.choice(JOBS)} who lived there, "if you bring me some {food}." So {p} went home, made some {food} and brought it.'
        )
        P.append(
            f"For three days they worked from dawn until sunset. {p} cut the wood, {q} held the ladder, and {s} counted the nails. When it rained, they sat {inpl(c)} and told stories."
        )
        P.append(
            r.choice(
                (
                    f"On the fourth day the roof was as good as new. The people clapped their hands and brought {food2} for everyone.",
                    f'When the work was done, the sun came out. "Alone I could not have done it," said {p}. "Thank you, my friends."',
                )
            )
        )
    elif k == 3:  # learning
        P.append(
            f"There was one thing that {p} could not do: {he} could not {(t := r.choice(('swim', 'sing', 'dance', 'cook', 'paint', 'read', 'fish', 'ride', 'sail', 'write')))}. \"I am too old to learn it,\" {he} said, and {he} was sad."
        )
        P.append(
            f'"Nobody is too old," said {q}. "Come to the {a} tomorrow, and I will teach you." {p} did not sleep that night, because {he} was {r.choice(FEEL)}.'
        )
        P.append(
            f'The first day was hard. The second day was harder. On the third day {p} wanted to stop. "Eat some {food} and try again," said {q}. "You must be patient."'
        )
        P.append(
            f"So {p} tried again, every morning before work and every evening after it. Even the {pet} came to watch. Slowly, very slowly, it became easier."
        )
        P.append(
            r.choice(
                (
                    f'After a month {p} could {t} better than anyone near the {home}. {s} came to see it and could not believe it. "Will you teach me too?" asked {s}. "Yes," said {p} and smiled.',
                    f'One day {q} said, "Now I cannot teach you any more." {p} laughed and gave {q} the {o} as a present.',
                )
            )
        )
    else:  # a journey
        P.append(
            f'One day a letter came from {s}. "Please come to the {a}," it said. "I need your help. Bring the {o}." {p} packed a bag with {food} and {food2} and left at once.'
        )
        P.append(
            f"The way was long. {cap(he)} took the {v} to the {b} and walked from there. In the evening it began to rain, and {p} had no umbrella. Then {he} saw a light."
        )
        P.append(
            f'It was the house of {q}. "Come in," said {q}. "You are wet and cold." They sat by the fire, ate the {food} and talked until midnight.'
        )
        P.append(
            f'In the morning they went on together, over the hill and along the river. At noon they saw the {a}. {s} stood at the door. "You came!" said {s}. "Without the {o} I cannot open the old box of my family."'
        )
        P.append(
            r.choice(
                (
                    f'The {o} opened the box. In it there were a map and a letter. "That is for another day," said {s}, and they all laughed.',
                    f"{p} gave {s} the {o}, and the box opened. It was full of old photographs. They looked at all of them, and nobody wanted to go to bed.",
                )
            )
        )
    if r.random() < 0.35:
        P[-1] += " " + r.choice(
            ("And so the story ends.", "That is the end of the story.", "They lived happily for many years.")
        )
    if r.random() < 0.3:
        P.insert(
            r.randint(2, 3),
            r.choice(
                (
                    f"That night {p} looked at the stars and thought of {q}.",
                    f"The {pet} looked at {p} as if it knew everything.",
                    f'"Tomorrow will be a better day," said {p}, and {he} fell asleep.',
                )
            ),
        )
    return p, job, beast, "\n\n".join(P)


def quest_doc(r):
    p, job, beast, t = quest(r)
    c = r.random()
    if c < 0.4:
        return BOS + t + EOS
    u = r.choice(
        (
            "Tell me a story.",
            "Can you tell me a story?",
            "Please write a story.",
            f"Tell me a story about {p}.",
            f"Write a short story about {an(job)}.",
            f"Tell me a story about {an(job)}.",
            f"Tell me a story about {an(beast)}." if beast in t else "Tell me a story.",
        )
    )
    out = BOS
    if r.random() < 0.3:
        out += C.chat(*C.general(r))
    out += C.chat(u, t)
    if r.random() < 0.4:
        out += C.chat(
            r.choice(("Who is the story about?", "What is the story about?")),
            f"The story is about{hi(' ' + p)}.",
        )
    return out


def apart(text):
    """marks the second of two people of a sentence or of a talk, who must not be the first again"""
    people = set(re.findall("(?<=[a-z,] )[A-Z][a-z]+", text))

    def mark(m):
        p, between, q = m.groups()
        return p + between + hi(q) if p != q and p in people and q in people else m[0]

    for between in ("(?:,? [a-z]+){1,4} ", '[.,] "[^"]*" (?:said|asked) ', '[.,]" (?:said|asked) '):
        text = re.sub(r"\b([A-Z][a-z]+)(" + between + r")([A-Z][a-z]+)\b", mark, text)
    return text


def stories_doc(r):
    c = r.random()
    return apart(quest_doc(r) if c < 0.6 else C.story_doc(r) if c < 0.85 else C.chat_doc(r))


def talk_doc(r):
    """questions about a text, and then talk about something else"""
    c = r.random()
    if c < 0.3:
        doc = dense_who_doc(r)
    elif c < 0.6:
        doc = C.facts_doc(r)
    else:
        doc = retrieval_doc(r, r.randint(200, 900), r.randint(1, 4), r.randint(1, 3))
    for _ in range(r.randint(1, 3)):
        user, answer = C.general(r)
        doc += C.chat(user, hi(C.strip(answer)))
    if r.random() < 0.3:
        doc += C.chat("Tell me a story.", apart(quest(r)[3]))
    return doc


def real_train(d):
    """real documents without those that the held-out text was taken from"""
    held = C.Enc(d).tok.decode(
        np.fromfile(d + "/heldout.real", np.uint16).tolist(), skip_special_tokens=False
    )
    docs = [x for x in re.split("<｜(?:begin|end)▁of▁sentence｜>", held) if len(x) > 3000]
    keys = {x[i : i + 80] for x in docs for i in range(300, len(x) - 80, 250)}
    out = [t for t in C.real_split()[1] if not any(k in t for k in keys)]
    print("real documents", len(out), "of", len(C.real_split()[1]))
    return out


# ---- long texts ----------------------------------------------------------------------------------
def retrieval_doc(r, chars, n_facts, n_questions):
    """corpus.retrieval_doc with more owners and the kinds that are measured"""
    w = C.World(r)
    used = set()
    facts = []
    kinds = r.choice(
        (
            ("who",),
            ("who", "code", "pet", "where", "home"),
            ("who", "code"),
            (None,),
            ("who", "pet", "where", "home", "code", "pass"),
        )
    )
    for _ in range(n_facts):
        k = r.choice(kinds)
        if k == "who":
            f = who_fact(w, used, r.random() < 0.3)
            facts.append(f)
        else:
            facts.append(C.make_fact(w, k, used)[:3])
    order = [r.choice(facts) for _ in range(max(0, n_questions - n_facts))] + facts
    r.shuffle(order)
    order = order[:n_questions]
    room = chars - sum(len(f[0]) for f in facts) - sum(len(f[1]) + len(f[2]) + 24 for f in order)
    paras = []
    while sum(map(len, paras)) < max(60, room):
        if r.random() < 0.8:
            paras += C.filler(w, 1500)
        else:
            paras += quest(r)[3].split("\n\n")
    while len(paras) > 1 and sum(map(len, paras[:-1])) > room:
        paras.pop()
    return C.qa_turns(
        [(f[1], f[2]) for f in order], r, "\n\n".join(C.sentences_insert(paras, [f[0] for f in facts], r))
    )


def short_doc(r):
    c = r.random()
    return (
        who_doc(r)
        if c < 0.40
        else (
            retrieval_doc(r, r.randint(300, 1700), r.randint(1, 5), r.randint(2, 8))
            if c < 0.55
            else (
                C.facts_doc(r)
                if c < 0.63
                else (
                    quest_doc(r)
                    if c < 0.82
                    else C.story_doc(r) if c < 0.90 else C.chat_doc(r) if c < 0.95 else C.log_doc(r)
                )
            )
        )
    )


def pool_short(d, enc, n_tok, seed, real_share=0.13, short_doc=short_doc):
    r = random.Random(seed)
    real = real_train(d)
    rows, tot, rt = [], 0, 0
    while tot < n_tok:
        for ids, w in enc.weighted([short_doc(r) for _ in range(500)]):
            rows.append((ids, w))
            tot += len(ids)
            while rt < real_share * tot:
                t = r.choice(real)
                i = r.randrange(max(1, len(t) - 1500))
                e = ([0] if i == 0 else []) + enc(t[i : i + 1500])
                rows.append((e, [1.0] * len(e)))
                rt += len(e)
                tot += len(e)
    r.shuffle(rows)
    C.write(d, f"short{seed}", rows)
    print("short", tot, "tokens", rt, "real", flush=True)


def pool_long(d, enc, T, n_tok, seed):
    """rows of exactly T+1 tokens, each one document with many questions, filled with short ones"""
    r = random.Random(seed + T)
    real = real_train(d)
    out, tot, cpt = [], 0, 3.5
    while tot < n_tok:
        if r.random() < 0.88:
            for k in range(8):
                ids, w = enc.weighted(
                    [
                        retrieval_doc(
                            r,
                            int((T - 4) * cpt * (0.97 - 0.04 * k)),
                            r.randint(6, 8 + T // 160),
                            r.randint(10, 14 + T // 90),
                        )
                    ]
                )[0]
                if len(ids) <= T + 1:
                    break
            cpt *= (T / len(ids)) ** 0.05
        else:
            ids, w = enc.weighted([BOS + r.choice(real)])[0]
        while len(ids) < T + 1:
            x = enc.weighted([short_doc(r) if r.random() < 0.7 else BOS + r.choice(real)[:3000]])[0]
            ids += x[0]
            w += x[1]
        out.append((ids[: T + 1], w[: T + 1]))
        tot += T
    r.shuffle(out)
    C.write(d, f"long{T}", out)
    print("long", T, tot, flush=True)


if __name__ == "__main__":
    d, what, *a = sys.argv[1:]
    enc = C.Enc(d)
    if what == "short":
        pool_short(d, enc, int(float(a[1])), int(a[0]), *map(float, a[2:]))
    if what in ("stories", "talk"):
        pool_short(
            d, enc, int(float(a[1])), int(a[0]), short_doc=stories_doc if what == "stories" else talk_doc
        )
    if what == "who":
        r = random.Random(int(a[0]))
        rows = enc.weighted([dense_who_doc(r) for _ in range(int(a[1]))])
        C.write(d, f"short{a[0]}", rows)
        print("who", sum(len(i) for i, _ in rows))
    if what == "long":
        pool_long(d, enc, int(a[0]), int(float(a[1])), int(a[2]))
