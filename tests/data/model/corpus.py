"""Programmatic low-entropy corpus: small-world stories, logs, planted facts with questions, chat turns, plus some real text.

usage: python corpus.py OUTDIR tokenizer | pools SEED | heldout
Text is made with markers: HI..END around answer words (loss weight 3), LO..END around unpredictable planted values (0.15).
"""

import glob
import gzip
import os
import random
import re
import sys
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from words import *

SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
BOS, EOS, HI, LO, END = "\x01", "\x05", "\x02", "\x03", "\x04"
hi = lambda s: HI + s + END
lo = lambda s: LO + s + END
strip = lambda s: re.sub("[\x02\x03\x04]", "", s)
an = lambda w: ("an " if w[0] in "aeiou" else "a ") + w
cap = lambda s: s[0].upper() + s[1:]
inpl = lambda p: f"{PLACES[p]} the {p}"
OBJ_NAMES = OBJECTS

FEM = set(
    S(
        """Anna Clara Emma Grace Ida Kate Mara Nora Paula Rosa Una Wendy Yara Zoe Alice Daisy Fiona Hanna Julia Lena Nina Rachel Tessa Martha Lucy Ruth Iris Karla Mabel Olga Sally Vera Agnes Celia
Dora Freya Hilda Jenny Lydia Nelly Pearl Sofia Viola Wilma Betty Doris Edith Greta Holly Irma Karen Laura Nadia Bella Delia Flora Hester Judith Leila Naomi Petra Stella Tilda"""
    )
)
WX = {
    "fine": [
        "The sun was shining",
        "It was a warm day",
        "The air was still",
        "A light breeze came from the sea",
        "It was hot and dry",
        "It was a bright morning",
        "The sky was blue",
    ],
    "wet": [
        "It was raining",
        "The sky was grey",
        "Dark clouds covered the sky",
        "Thunder rolled in the distance",
        "The rain did not stop",
        "The ground was wet after the rain",
    ],
    "cold": [
        "A cold wind blew from the north",
        "Snow was falling",
        "Frost covered the roofs",
        "Thick fog lay over the land",
        "It was cold outside",
        "The lake was covered with ice",
    ],
}


def newname(r):
    return cap(
        "".join(
            r.choice(ON) + r.choice(VO) + (r.choice(CO) if r.random() < 0.5 else "")
            for _ in range(r.choice((1, 2, 2)))
        )
    )


class World:
    """random source of one document; held=True uses only names/keys that training never saw"""

    def __init__(s, r, held=False, npeople=None):
        s.r, s.held = r, held
        k = npeople or r.choice((2, 3, 3, 4))
        s.people = []
        while len(s.people) < k:
            n = s.person()
            if n not in s.people:
                s.people.append(n)
        s.job = {p: r.choice(JOBS) for p in s.people}
        s.fem = {
            p: p in FEM or (p not in NAMES and p not in HELD_NAMES and p[-1] in "aeiou") for p in s.people
        }
        s.wx = WX[r.choice(("fine", "fine", "wet", "cold"))]
        s.places = r.sample(list(PLACES), r.choice((4, 5, 6)))
        s.at = {p: r.choice(s.places[:3]) for p in s.people}
        s.objs = {}
        s.last = None
        for o in r.sample(OBJECTS, r.choice((3, 4, 5))):
            s.objs[(r.choice(ADJS + COLOURS + MATERIALS) + " " + o) if r.random() < 0.6 else o] = (
                "place",
                r.choice(s.places),
            )
        s.town = newname(r)
        s.animal = r.choice(ANIMALS)

    def person(s):
        if s.held:
            return s.r.choice(HELD_NAMES)
        return s.r.choice(NAMES) if s.r.random() < 0.7 else newname(s.r)

    def he(s, p):
        return "she" if s.fem[p] else "he"

    def his(s, p):
        return "her" if s.fem[p] else "his"

    def both(s, p, q):
        s.at[q] = s.at[p]
        return s.at[p]

    def plot(s):
        """a small chain of cause and effect, consistent with and updating the state"""
        r = s.r
        p, q = r.sample(s.people, 2)
        he, his = s.he(p), s.his(p)
        o = r.choice(list(s.objs))
        a, b, c = r.sample(s.places, 3)
        f = r.choice(FOODS)
        an1 = r.choice(ANIMALS)
        k = r.randrange(9)
        v = r.choice(VEHICLES)
        o2 = r.choice(OBJECTS)
        him = "her" if he == "she" else "him"
        if k == 0:
            s.objs[o] = ("who", p)
            s.at[p] = c
            s.at[q] = c
            return f'{p} could not find the {o}. {cap(he)} looked {inpl(a)}, but it was not there. {cap(he)} looked {inpl(b)}, but it was not there. Then {q} came and said, "I saw the {o} {inpl(c)}." They went to the {c} together, and there it was. {p} took the {o} and was very happy.'
        if k == 1:
            s.at[p] = s.at[q] = a
            return f'{p} was hungry, so {he} went to the {a} to buy some {f}. But there was no {f} left. "Do not be sad," said {q}. "You can have some of my {f}." They sat down and ate together, and {p} said thank you.'
        if k == 2:
            s.at[p] = b
            return f"On the way to the {b} {p} met {an(r.choice(ADJS[:3]))} {an1}. The {an1} was {r.choice(('hurt', 'lost', 'hungry', 'cold', 'afraid'))} and could not walk. {p} gave it some {f} and some water. After a while the {an1} felt better, and it followed {him} to the {b}."
        if k == 3:
            s.at[p] = s.at[q] = a
            s.objs[o] = ("who", q)
            return f'{q} wanted the {o} very much. "Please give me the {o}," said {q}. "What will you give me for it?" asked {p}. "I will give you some {f}," said {q}. So {p} took the {f}, and {q} took the {o}.'
        if k == 4:
            return f"The {v} was broken, because a wheel had come off. {p} could not repair it alone. {q} brought {an(r.choice(('hammer', 'rope', 'saw', 'wrench')))} and helped {him}. They worked until sunset. At last the {v} was as good as new."
        if k == 5:
            s.at[p] = a
            return (
                f"In the night {p} heard a noise {inpl(a)}. {cap(he)} was afraid, but {he} took a lamp and went to look. It was only {an(an1)}. {p} laughed and went back to bed."
                if False
                else f"In the night {p} heard a noise {inpl(a)}. {cap(he)} was afraid, but {he} took a lamp and went to look. It was only {an(an1)}. {p} laughed and gave it some {f}."
            )
        if k == 6:
            return f"\"Will you teach me how to {r.choice(('swim', 'sing', 'dance', 'cook', 'paint', 'read', 'fish', 'ride', 'sail', 'write'))}?\" asked {p}. \"Yes,\" said {q}, \"but you must be patient.\" Every day they practised for an hour. At first it was hard for {p}, but soon {he} could do it very well."
        if k == 7:
            s.at[p] = s.at[q] = b
            return f"It began to rain, and {p} and {q} had no umbrella. They ran to the {b} and waited there. {q} made a fire, and {p} told a story. When the rain stopped, the sun came out again."
        return f"It was the birthday of {q}. {p} baked a cake with {f} and brought {him if False else 'a present'}. It was {an(r.choice(COLOURS + MATERIALS))} {o2}. \"Thank you, {p},\" said {q}. \"This is the best day of the year.\""

    def whereis(s, o):
        k, v = s.objs[o]
        return f"{v} has the {o}" if k == "who" else f"the {o} is {inpl(v)}"

    def event(s):
        r = s.r
        p = r.choice(s.people)
        q = r.choice([x for x in s.people if x != p])
        pl = s.at[p]
        c = r.random()
        here = [o for o, (k, v) in s.objs.items() if k == "place" and v == pl]
        mine = [o for o, (k, v) in s.objs.items() if k == "who" and v == p]
        if here and c < 0.3:
            o = r.choice(here)
            s.objs[o] = ("who", p)
            return r.choice(
                (
                    f"{p} picked up the {o}.",
                    f"{p} took the {o}.",
                    f"{p} found the {o} {inpl(pl)} and took it.",
                    f"{p} saw the {o} and picked it up.",
                    f"There {p} found the {o}.",
                )
            )
        if mine and c < 0.5:
            o = r.choice(mine)
            if s.at[q] == pl:
                s.objs[o] = ("who", q)
                return r.choice(
                    (
                        f"{p} gave the {o} to {q}.",
                        f"{p} handed {q} the {o}.",
                        f"{p} gave {q} the {o}, and {q} said thank you.",
                        f'"Take the {o}," said {p}. {q} took it and smiled.',
                    )
                )
            s.objs[o] = ("place", pl)
            return r.choice(
                (
                    f"{p} left the {o} {inpl(pl)}.",
                    f"{p} put the {o} down {inpl(pl)}.",
                    f"{p} hid the {o} {inpl(pl)}.",
                )
            )
        if c < 0.68:
            n = r.choice([x for x in s.places if x != pl])
            s.at[p] = n
            why = r.choice(
                (
                    "",
                    "",
                    "",
                    f" to look for {q}",
                    " to rest",
                    f" because {s.he(p)} was {r.choice(FEEL)}",
                    " to find some food",
                    f" with {s.his(p)} {s.animal}",
                )
            )
            return r.choice(
                (
                    f"{p} went to the {n}{why}.",
                    f"{p} walked to the {n}{why}.",
                    f"{p} ran to the {n}{why}.",
                    f"{p} hurried to the {n}{why}.",
                    f"{p} left the {pl} and went to the {n}{why}.",
                    f"{p} took the {r.choice(VEHICLES)} to the {n}{why}.",
                )
            )
        if c < 0.78:
            o = r.choice(list(s.objs))
            k, v = s.objs[o]
            if k == "who":
                return (
                    f'"Who has the {o}?" asked {q if v != q else p}. "{hi(v)} has the {o}," said {p if v != q else q}.'
                    if v != p
                    else f'"Who has the {o}?" asked {q}. "I have the {o}," said {hi(p)}.'
                )
            return f"\"Where is the {o}?\" asked {p}. \"The {o} is{hi(' ' + inpl(v))},\" said {q}."
        f = r.choice(FOODS)
        a = r.choice(ANIMALS)
        return r.choice(
            (
                f"{p} ate some {f} and felt {r.choice(FEEL)}.",
                f"{p} and {q} talked about the {r.choice(FOODS)}.",
                f"{an(r.choice(ADJS)).capitalize()} {a} {r.choice(('ran', 'slept', 'sat', 'waited', 'played'))} near the {r.choice(s.places)}.",
                f"{p} was {r.choice(FEEL)} because the {s.animal} was {r.choice(FEEL)}.",
                f"{r.choice(s.wx)}, so {p} stayed {inpl(pl)}.",
                f'"I am {r.choice(FEEL)}," said {p}. "So am I," said {q}.',
                f"{p} heard {an(a)} and looked around.",
                f'"Good morning, {q}," said {p}. "Good morning, {p}," said {q}.',
                f"{p} smiled at {q}, and {q} smiled back.",
                f"{p} worked as {an(s.job[p])} and liked the work.",
                f"{p} sat down and drank some tea.",
                f"{p} sang an old song about the {r.choice(('sea', 'moon', 'rain', 'sun', 'stars', 'snow'))}.",
                f"{p} told {q} a story about {an(r.choice(PADJ))} {r.choice(JOBS)}.",
                f'"Do you want some {f}?" asked {p}. "Yes, please," said {q}. They shared the {f}.',
                f"{p} helped {q} to clean the {r.choice(s.places)}.",
                f"{p} counted {r.choice(NUMS[3:])} {r.choice(ANIMALS)}s.".replace("foxs", "foxes")
                .replace("mouses", "mice")
                .replace("sheeps", "sheep")
                .replace("fishs", "fish")
                .replace("gooses", "geese")
                .replace("deers", "deer")
                .replace("wolfs", "wolves")
                .replace("ponys", "ponies")
                .replace("butterflys", "butterflies"),
            )
        )

    def opening(s):
        r = s.r
        p, q = s.people[:2]
        return r.choice(
            (
                f"Once upon a time there was {an(r.choice(PADJ))} {s.job[p]} called {p}. {cap(s.he(p))} lived in a {r.choice(('small', 'little', 'quiet', 'old', 'pretty'))} {r.choice(('house', 'cottage', 'village', 'town'))} near the {s.places[0]}.",
                f"{p} was {an(r.choice(PADJ))} {s.job[p]} in the town of {s.town}. {cap(s.his(p))} best friend was {q}, {an(r.choice(PADJ))} {s.job[q]}.",
                f"{r.choice(s.wx)}. {p} and {q} were {inpl(s.both(p, q))}.",
                f"One day {p} the {s.job[p]} went out to look for {q}.",
                f"There was {an(r.choice(PADJ))} {s.animal} in the town of {s.town}. It belonged to {p}, {an(r.choice(PADJ))} {s.job[p]}.",
                f"{p} and {q} lived in {s.town}. {p} was {an(s.job[p])}, and {q} was {an(s.job[q])}.",
            )
        )

    def closing(s):
        r = s.r
        p, q = s.people[:2]
        o = r.choice(list(s.objs))
        return r.choice(
            (
                f"In the end {s.whereis(o).replace(' has ', ' had ').replace(' is ', ' was ')}, and everyone went home.",
                f"{p} and {q} were tired but happy, and they went to bed.",
                f"From that day on {p} and {q} were good friends.",
                f"And so the day came to an end.",
                f"Then {p} said good night to {q} and fell asleep.",
            )
        )

    def para(s, n, facts=()):
        r = s.r
        out = [s.event() for _ in range(n)]
        for i in range(len(out)):
            c = r.random()
            if c < 0.18 and out[i][0] != '"':
                t = r.choice(TIMES)
                out[i] = (
                    t
                    + " "
                    + (
                        out[i]
                        if out[i].split(" ")[0].strip(",.") in s.people
                        else out[i][0].lower() + out[i][1:]
                    )
                )
            elif c < 0.26:
                out.insert(i, r.choice(s.wx) + ".")
        for f in facts:
            out.insert(r.randint(0, len(out)), f)
        return " ".join(out)

    def log(s, d, facts=()):
        r = s.r
        ship = s.__dict__.setdefault("ship", r.choice(SHIPS))
        cape = s.__dict__.setdefault("cape", newname(r))
        out = [
            r.choice(
                (
                    f"Wind from the {r.choice(DIRS)}, {r.choice(NUMS[2:])} knots.",
                    f"{r.choice(s.wx)}.",
                    "The sea was calm.",
                    "The waves were high.",
                    f"We left {s.town} at {r.choice(NUMS[1:12])} o'clock.",
                    f"The {ship} made good speed.",
                )
            )
        ]
        for _ in range(r.randint(1, 4)):
            p = r.choice(s.people)
            out.append(
                r.choice(
                    (
                        f"We saw {r.choice(NUMS[2:])} {r.choice(('whales', 'dolphins', 'seals', 'gulls', 'ships', 'small boats'))} in the {r.choice(DIRS)}.",
                        f"{p} repaired the {r.choice(('sail', 'mast', 'pump', 'anchor', 'rope', 'rudder', 'compass'))}.",
                        f"{p} cooked {r.choice(FOODS)} for the crew.",
                        f"We passed Cape {cape} at {r.choice(('noon', 'dawn', 'sunset', 'midnight'))}.",
                        f"{p} was {r.choice(FEEL)} and stayed in the cabin.",
                        f"The crew ate {r.choice(FOODS)} and {r.choice(FOODS)}.",
                        f"{p} kept watch until midnight.",
                        f"We found {an(r.choice(ADJS))} {r.choice(OBJECTS)} on the deck. {p} kept it.",
                        s.event(),
                    )
                )
            )
        for f in facts:
            out.insert(r.randint(0, len(out)), f)
        return f"Day {d}. " + " ".join(out)


# ---- planted facts: statement(s), question, answer sentence (value marked) ----
def make_fact(w, kind=None, used=None):
    r = w.r
    kind = kind or r.choice(
        ("code", "code", "code", "pass", "who", "where", "colour", "pet", "age", "home", "job", "likes")
    )
    used = used if used is not None else set()
    for _ in range(50):
        p = r.choice(HELD_NAMES) if w.held else r.choice(NAMES) if r.random() < 0.6 else newname(r)
        pl = r.choice(list(PLACES))
        o = r.choice(COLOURS + MATERIALS + ADJS) + " " + r.choice(OBJECTS)
        if kind in ("code", "pass"):
            key = r.choice(HELD_CODEKEYS if w.held else CODEKEYS) if r.random() < 0.6 else newname(r)
            key = (r.choice(COLOURS + ADJS) + " " + key) if r.random() < 0.25 and key[0].islower() else key
        elif kind in ("who", "where", "colour"):
            key = o
        else:
            key = p
        if (kind, key) not in used:
            used.add((kind, key))
            break
    if kind == "code":
        v = " " + "".join(r.choice("0123456789") for _ in range(4))
        st = r.choice(
            (
                f"The {key} code is{lo(v)}.",
                f"The {key} code is{lo(v)}.",
                f"Remember: the {key} code is{lo(v)}.",
                f"{r.choice(w.people)} wrote in the book: the {key} code is{lo(v)}.",
                f"Note that the {key} code is{lo(v)}.",
            )
        )
        return st, f"What is the {key} code?", f"The {key} code is{hi(v)}.", f"The {key} code is", v, kind
    if kind == "pass":
        v = " " + (r.choice(OBJECTS + ANIMALS + FOODS) if r.random() < 0.5 else newname(r).lower())
        return (
            f"The password of the {key} is{lo(v)}.",
            f"What is the password of the {key}?",
            f"The password of the {key} is{hi(v)}.",
            f"The password of the {key} is",
            v,
            kind,
        )
    if kind == "who":
        return (
            (
                f"{lo(p)} has the {key}."
                if r.random() < 0.5
                else f"The {key} belongs to{lo(' ' + p)}, so{hi(' ' + p)} has the {key}."
            ),
            f"Who has the {key}?",
            f"{hi(p)} has the {key}.",
            "",
            " " + p,
            kind,
        )
    if kind == "where":
        return (
            f"The {key} is{lo(' ' + inpl(pl))}.",
            f"Where is the {key}?",
            f"The {key} is{hi(' ' + inpl(pl))}.",
            f"The {key} is",
            " " + inpl(pl),
            kind,
        )
    if kind == "colour":
        v = " " + r.choice(COLOURS)
        key = r.choice(OBJECTS) + " of " + p
        return (
            f"The {key} is{lo(v)}.",
            f"What colour is the {key}?",
            f"The {key} is{hi(v)}.",
            f"The {key} is",
            v,
            kind,
        )
    if kind == "pet":
        a = r.choice(ANIMALS[:8])
        v = " " + newname(r)
        return (
            f"{key} has a {a} called{lo(v)}.",
            f"What is the {a} of {key} called?",
            f"The {a} of {key} is called{hi(v)}.",
            f"The {a} of {key} is called",
            v,
            kind,
        )
    if kind == "age":
        v = " " + str(r.randint(11, 99))
        return (
            f"{key} is{lo(v)} years old.",
            f"How old is {key}?",
            f"{key} is{hi(v)} years old.",
            f"{key} is",
            v,
            kind,
        )
    if kind == "home":
        v = " " + newname(r)
        return (
            f"{key} lives in{lo(v)}.",
            f"Where does {key} live?",
            f"{key} lives in{hi(v)}.",
            f"{key} lives in",
            v,
            kind,
        )
    if kind == "job":
        v = " " + an(r.choice(JOBS))
        return f"{key} is{lo(v)}.", f"What is the job of {key}?", f"{key} is{hi(v)}.", f"{key} is", v, kind
    v = " " + r.choice(FOODS)
    return (
        f"{key} likes{lo(v)} best.",
        f"What does {key} like best?",
        f"{key} likes{hi(v)} best.",
        f"{key} likes",
        v,
        "likes",
    )


def filler(w, n):  # about n characters of story / log / diary with no facts
    r = w.r
    out, tot, day = [], 0, r.randint(1, 60)
    mode = r.random()
    while tot < n:
        if r.random() < 0.12:
            w2 = World(r, w.held)
            w2.town = w.town
            w.__dict__.update(w2.__dict__)
            out.append(w.opening())
        else:
            out.append(
                w.log(day)
                if mode < 0.3
                else (f"{r.choice(DAYS)}, {r.randint(1, 28)} {r.choice(MONTHS)}. " if mode < 0.4 else "")
                + (w.plot() if r.random() < 0.3 else w.para(r.randint(3, 7)))
            )
            day += 1
        tot += len(out[-1])
    return out


def sentences_insert(paras, facts, r):  # put each fact between sentences of random paragraphs
    for f in facts:
        i = r.randrange(len(paras))
        ss = re.split(r"(?<=[.!?\"]) (?=[A-Z\"])", paras[i])
        ss.insert(r.randint(0 if len(ss) < 2 else 1, len(ss)), f)
        paras[i] = " ".join(ss)
    return paras


def chat(user, assistant):
    return f"User: {user}\n\nAssistant: {assistant}{EOS}"


def qa_turns(qs, r, first):
    """chat turns over a text: first user turn holds the text"""
    out = ""
    for i, (q, a) in enumerate(qs):
        out += chat((first + "\n\n" + q) if i == 0 and first else q, a)
    return BOS + out


def retrieval_doc(r, chars, nfacts, held=False, dense=None):
    """text of about `chars` characters with planted facts, then chat questions about them"""
    w = World(r, held)
    used = set()
    kinds = r.choice((None, None, "code", "code", "mix2"))
    kk = r.sample(("code", "pass", "who", "where", "pet", "home", "age"), 2)
    facts = [
        make_fact(w, kinds if kinds == "code" else r.choice(kk) if kinds == "mix2" else None, used)
        for _ in range(nfacts)
    ]
    order = facts * 2
    r.shuffle(order)
    order = order[: max(1, dense or min(len(order), r.randint(1, 2 * nfacts)))]
    room = chars - sum(len(f[0]) for f in facts) - sum(len(f[1]) + len(f[2]) + 24 for f in order)
    paras = filler(w, max(60, room))
    inline = r.random()
    if inline < 0.25:  # questions inside the text
        k = len(order) // 2 + 1
        paras = sentences_insert(paras, [f[0] for f in facts], r)
        tail = [f"Question: {f[1]}\nAnswer: {f[2]}" for f in order]
        return BOS + "\n\n".join(paras) + "\n\n" + "\n".join(tail) + EOS
    paras = sentences_insert(paras, [f[0] for f in facts], r)
    return qa_turns([(f[1], f[2]) for f in order], r, "\n\n".join(paras))


def story(r, held=False, n=None):
    w = World(r, held)
    ps = [w.opening() + " " + w.para(r.randint(2, 4))] + [
        (
            w.plot() + (" " + w.para(r.randint(1, 3)) if r.random() < 0.5 else "")
            if r.random() < 0.55
            else w.para(r.randint(3, 6))
        )
        for _ in range(r.randint(1, 3))
    ]
    ps[-1] += " " + w.closing()
    return w, "\n\n".join(ps)


def state_qa(w, r):  # questions about the final state of a story
    qs = []
    for o, (k, v) in w.objs.items():
        qs.append(
            (f"Who has the {o}?", f"{hi(v)} has the {o}.")
            if k == "who"
            else (f"Where is the {o}?", f"The {o} is{hi(' ' + inpl(v))}.")
        )
    for p in w.people:
        qs.append((f"Where is {p}?", f"{p} is{hi(' ' + inpl(w.at[p]))}."))
    r.shuffle(qs)
    return qs[: r.randint(1, 4)]


def summary(w, text):
    p, q = w.people[:2]
    o, (k, v) = list(w.objs.items())[-1]
    return w.r.choice(
        (
            f"The story is about{hi(' ' + p)} and{hi(' ' + q)}. In the end {w.whereis(o)}.",
            f"It is a story about{hi(' ' + p)} and{hi(' ' + q)}.",
        )
    )


def general(r):
    """one short question/answer pair of general chat"""
    c = r.random()
    k = lambda d: r.choice(list(d.items()))
    if c < 0.22:
        a, b = r.randint(0, 12), r.randint(0, 12)
        op = r.choice("++-")
        if op == "-" and b > a:
            a, b = b, a
        v = a + b if op == "+" else a - b
        return (
            (
                f"What is {a} {'plus' if op == '+' else 'minus'} {b}?",
                f"{a} {'plus' if op == '+' else 'minus'} {b} is{hi(' ' + str(v))}.",
            )
            if r.random() < 0.5
            else (f"What is {a} {op} {b}?", f"{a} {op} {b} ={hi(' ' + str(v))}.")
        )
    if c < 0.34:
        a, b = k(CAPITALS)
        return (
            (f"What is the capital of {a}?", f"The capital of {a} is{hi(' ' + b)}.")
            if r.random() < 0.75
            else (f"Which country is {b} the capital of?", f"{b} is the capital of{hi(' ' + a)}.")
        )
    if c < 0.42:
        a, b = k(OPP)
        a, b = (a, b) if r.random() < 0.5 else (b, a)
        return f"What is the opposite of {a}?", f"The opposite of {a} is{hi(' ' + b)}."
    if c < 0.47:
        a, b = k(COLFACT)
        return (
            f"What colour is {a}?" if a[-1] != "s" or a == "grass" else f"What colour are {a}?"
        ), f"{cap(a)} {'are' if a in ('lemons', 'carrots') else 'is'}{hi(' ' + b)}."
    if c < 0.52:
        a, b = k(SOUNDS)
        return (
            f"What sound does a {a} make?" if a[0] not in "aeiou" else f"What sound does an {a} make?"
        ), f"{cap(an(a))}{hi(' ' + b)}."
    if c < 0.60:
        L, nm = r.choice(((DAYS, "day"), (MONTHS, "month")))
        i = r.randrange(len(L))
        return r.choice(
            (
                (f"What {nm} comes after {L[i]}?", f"After {L[i]} comes{hi(' ' + L[(i + 1) % len(L)])}."),
                (f"What {nm} comes before {L[i]}?", f"Before {L[i]} comes{hi(' ' + L[i - 1])}."),
            )
        )
    if c < 0.68:
        a = r.randint(1, 10)
        b = a + r.randint(3, 9)
        return f"Count from {a} to {b}.", ", ".join(map(str, range(a, b + 1))) + "."
    if c < 0.80:
        ws = [
            r.choice(OBJECTS + ANIMALS + FOODS + NAMES) if r.random() < 0.7 else newname(r)
            for _ in range(r.randint(3, 9))
        ]
        t = ", ".join(ws)
        return r.choice(
            (
                (f"Repeat after me: {lo(t)}.", hi(t) + "."),
                (
                    f"How many words are in this list? {t}",
                    f"There are{hi(' ' + NUMS[len(ws)])} words in the list.",
                ),
                (f"What is the first word of this list? {t}", f"The first word is{hi(' ' + ws[0])}."),
                (f"What is the last word of this list? {t}", f"The last word is{hi(' ' + ws[-1])}."),
                (f"Repeat this list: {t}.", hi(t) + "."),
            )
        )
    if c < 0.86:
        n, a, b = r.choice(NAMES), r.randint(2, 10), r.randint(1, 9)
        o = r.choice(("apples", "pears", "plums", "eggs", "coins", "books", "stamps", "shells"))
        return (
            (
                f"{n} has {a} {o} and finds {b} more. How many {o} does {n} have now?",
                f"{n} has{hi(' ' + str(a + b))} {o} now.",
            )
            if r.random() < 0.5 or b > a
            else (
                f"{n} has {a} {o} and loses {b}. How many {o} does {n} have now?",
                f"{n} has{hi(' ' + str(a - b))} {o} now.",
            )
        )
    n = r.choice(NAMES)
    return r.choice(
        (
            ("Hello!", "Hello! How can I help you?"),
            ("Hi", "Hello! What can I do for you?"),
            ("Good morning.", "Good morning! How can I help you today?"),
            ("How are you?", "I am fine, thank you. How are you?"),
            ("Who are you?", "I am a small language model. I can tell stories and answer simple questions."),
            ("What is your name?", "I have no name. I am a small language model."),
            (
                "What can you do?",
                "I can tell a story, answer questions about a text, count, and do simple sums.",
            ),
            ("Thank you.", "You are welcome."),
            ("Thanks!", "You are welcome!"),
            ("Goodbye.", "Goodbye! Have a nice day."),
            ("Are you a person?", "No, I am a small language model."),
            (f"My name is {n}.", f"Hello, {n}! Nice to meet you."),
            (f"Hello, I am {n}.", f"Hello, {n}! How can I help you?"),
            ("Tell me a joke.", "Why did the hen cross the road? To get to the other side."),
            ("What do you like?", "I like stories about the sea."),
            ("Do you like music?", "Yes, I like songs about the sea."),
        )
    )


def tell(r):  # "tell me a story about ..."
    w, t = story(r)
    p = w.people[0]
    return (
        r.choice(
            (
                ("Tell me a story.", t),
                (f"Tell me a story about {p}.", t),
                (f"Write a short story about {an(w.job[p])}.", None),
                (f"Tell me a story about {p} and {w.people[1]}.", t),
                (f"Tell me a story about {an(w.animal)}.", "A"),
                ("Can you tell me a story?", "Yes. " + t),
                (f"Tell me a story about {an(w.job[p])}.", None),
                ("Please write a story.", t),
            )
        ),
        w,
        t,
    )


def chat_doc(r):
    out = BOS
    for _ in range(r.randint(1, 6)):
        if r.random() < 0.12:
            (u, t), w, full = tell(r)
            if t == "A":
                p = w.people[0]
                t = (
                    f"There was {an(r.choice(PADJ))} {w.animal} in the town of {w.town}. It belonged to {p}, {an(r.choice(PADJ))} {w.job[p]}. "
                    + full.split(". ", 1)[1]
                )
            if t is None:
                t = f"{w.people[0]} was {an(r.choice(PADJ))} {w.job[w.people[0]]}. " + full.split(". ", 1)[1]
            out += chat(u, t)
        else:
            out += chat(*general(r))
    return out


def story_doc(r, held=False):
    w, t = story(r, held)
    c = r.random()
    if c < 0.35:
        return BOS + t + EOS
    qs = state_qa(w, r)
    if r.random() < 0.3:
        qs.insert(
            r.randint(0, len(qs)),
            (
                r.choice(("What is the story about?", "Summarise the story.", "Give a short summary.")),
                summary(w, t),
            ),
        )
    return qa_turns(qs, r, t)


def log_doc(r, held=False):
    w = World(r, held)
    d = r.randint(1, 90)
    facts = [make_fact(w) for _ in range(r.randint(0, 3))]
    days = []
    for i in range(r.randint(2, 6)):
        days.append(w.log(d + i, [facts[i][0]] if i < len(facts) else ()))
    t = ("Log of the " + w.__dict__.get("ship", "ship") + ".\n\n" if r.random() < 0.5 else "") + "\n\n".join(
        days
    )
    return qa_turns([(f[1], f[2]) for f in facts], r, t) if facts and r.random() < 0.7 else BOS + t + EOS


def facts_doc(r, held=False):  # dense: many facts, many questions, little filler
    w = World(r, held)
    used = set()
    k = r.choice((None, "code", "pass", "who", "where", "pet", "home"))
    fs = [make_fact(w, k, used) for _ in range(r.randint(3, 9))]
    body = [f[0] for f in fs]
    for _ in range(r.randint(0, 4)):
        body.insert(r.randint(0, len(body)), w.event())
    order = fs * r.choice((1, 2))
    r.shuffle(order)
    return qa_turns([(f[1], f[2]) for f in order], r, " ".join(body))


def short_doc(r):
    c = r.random()
    return (
        facts_doc(r)
        if c < 0.30
        else (
            retrieval_doc(r, r.randint(300, 1600), r.randint(1, 5))
            if c < 0.42
            else story_doc(r) if c < 0.72 else log_doc(r) if c < 0.82 else chat_doc(r)
        )
    )


# ---- real text ----
def real_docs():
    root = os.path.dirname(os.__file__)
    out = []
    import ast

    for f in sorted(glob.glob(root + "/*.py") + glob.glob(root + "/*/*.py")):
        if re.search(r"test|site-packages|idlelib|lib2to3|encodings|pydoc_data|turtledemo", f):
            continue
        try:
            t = open(f, encoding="utf-8").read()
        except Exception:
            continue
        if 1000 < len(t) and t.isascii():
            out.append(t[:12000])
    for f in sorted(glob.glob(os.path.join(os.environ.get("DOC_ROOT", "/usr/share"), "common-licenses/*"))):
        if not os.path.islink(f):
            out.append(open(f, encoding="utf-8", errors="ignore").read())
    for f in sorted(glob.glob(os.path.join(os.environ.get("DOC_ROOT", "/usr/share"), "man/man1/[a-m]*.gz")))[
        :250
    ]:
        try:
            t = gzip.open(f, "rt", encoding="utf-8").read()
        except Exception:
            continue
        t = "\n".join(
            re.sub(r"\\f.|\\\w?|\\", "", re.sub(r"^\.[A-Za-z]+ ?", "", l))
            for l in t.splitlines()
            if not l.startswith(('.\\"', "'\\\""))
        )
        t = re.sub(r"\n{3,}", "\n\n", t)
        if len(t) > 1500 and t.isascii():
            out.append(t[:10000])
    random.Random(5).shuffle(out)
    return out


class Enc:
    def __init__(s, d):
        from tokenizers import Tokenizer

        s.tok = Tokenizer.from_file(d + "/tokenizer.json")

    def __call__(s, t):
        return s.tok.encode(t, add_special_tokens=False).ids

    def weighted(s, docs):
        """marked docs -> list of (ids, weights); segments are cut at markers, which stand at pre-token borders"""
        segs, meta = [], []
        for di, d in enumerate(docs):
            w = 1.0
            d = re.sub(" ([\x02\x03])(?! )", r"\1 ", d)  # a word takes the space before it into its token
            for x in re.split("([\x01-\x05])", d):
                if x == "":
                    continue
                if x == HI:
                    w = 3.0
                elif x == LO:
                    w = 0.15
                elif x == END:
                    w = 1.0
                elif x == BOS:
                    meta.append((di, 0))
                elif x == EOS:
                    meta.append((di, 1))
                else:
                    meta.append((di, w, len(segs)))
                    segs.append(x)
        es = s.tok.encode_batch(segs, add_special_tokens=False)
        out = [([], []) for _ in docs]
        for m in meta:
            i, wt = out[m[0]]
            if len(m) == 2:
                i.append(m[1])
                wt.append(1.0)
            else:
                e = es[m[2]].ids
                i.extend(e)
                wt.extend([m[1]] * len(e))
        return out


def train_tokenizer(d):
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers, Regex

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    r = random.Random(3)
    syn = [strip(short_doc(r)).replace(BOS, "").replace(EOS, "") for _ in range(6000)]
    real = real_docs()
    syn.append(" ".join(" " + x for x in list(CAPITALS) + list(CAPITALS.values()) for _ in range(30)))
    tok.train_from_iterator(
        syn + real[:150],
        trainers.BpeTrainer(
            vocab_size=2048,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tok.save(d + "/tokenizer.json")
    e = lambda s: tok.encode(s, add_special_tokens=False).ids
    n = sum(map(len, syn))
    print(
        "chars/token syn",
        n / sum(len(e(s)) for s in syn),
        "real",
        sum(map(len, real[150:200])) / sum(len(e(s)) for s in real[150:200]),
        "real docs",
        len(real),
        sum(map(len, real)),
    )


def real_split():
    d = real_docs()
    n = max(12, len(d) // 20)
    return d[:n], d[n:]


def write(d, name, rows):
    np.concatenate([np.array(i, np.uint16) for i, _ in rows]).tofile(f"{d}/{name}.ids")
    np.concatenate([np.round(np.array(w) * 50).astype(np.uint8) for _, w in rows]).tofile(f"{d}/{name}.w")


def pool_short(d, enc, n_tok, seed):
    r = random.Random(seed)
    real = real_split()[1]
    rows, tot, rt = [], 0, 0
    while tot < n_tok:
        docs = [short_doc(r) for _ in range(1500)]
        for ids, w in enc.weighted(docs):
            rows.append((ids, w))
            tot += len(ids)
            while rt < 0.13 * tot:
                t = r.choice(real)
                i = r.randrange(max(1, len(t) - 1500))
                e = ([0] if i == 0 else []) + enc(t[i : i + 1500])
                rows.append((e, [1.0] * len(e)))
                rt += len(e)
                tot += len(e)
    r.shuffle(rows)
    write(d, f"short{seed}", rows)
    print("short", tot, "tokens", rt, "real", flush=True)


def pool_long(d, enc, n_tok, T, seed):
    """rows of exactly T+1 tokens, each one or two documents that fill it"""
    r = random.Random(seed + T)
    real = real_split()[1]
    out, tot = [], 0
    one = lambda x: enc.weighted([x])[0]
    cpt = 3.55
    while tot < n_tok:
        c = r.random()
        if c < 0.85:
            L = T if r.random() < 0.6 else r.randint(T // 4, T)
            nf, dn = r.randint(3, 4 + L // 150), r.randint(4, 8 + L // 60)
            for k in range(6):
                ids, w = one(retrieval_doc(r, int((L - 4) * cpt * (1 - 0.03 * k)), nf, dense=dn))
                if len(ids) <= T + 1:
                    break
            if L == T:
                cpt *= (T / len(ids)) ** 0.1
        else:
            ids, w = one(story_doc(r) if c < 0.93 else BOS + r.choice(real))
        while len(ids) < T + 1:
            x = one(short_doc(r) if r.random() < 0.7 else BOS + r.choice(real)[:3000])
            ids += x[0]
            w += x[1]
        out.append((ids[: T + 1], w[: T + 1]))
        tot += T
    r.shuffle(out)
    write(d, f"long{T}", out)
    print("long", T, tot, flush=True)


def pool_copy(d, n_tok, seed):
    """random token sequences repeated with some period: the plainest induction signal"""
    r = np.random.default_rng(seed)
    ids, w, tot = [], [], 0
    while tot < n_tok:
        P = int(r.integers(4, 50))
        k = max(2, min(12, int(r.integers(100, 260)) // P))
        a = r.integers(3, 2048, P)
        x = np.concatenate([[0], np.tile(a, k)])
        v = np.full(len(x), 50)
        v[: P + 1] = 3
        ids.append(x)
        w.append(v)
        tot += len(x)
    np.concatenate(ids).astype(np.uint16).tofile(f"{d}/copy.ids")
    np.concatenate(w).astype(np.uint8).tofile(f"{d}/copy.w")


# ---- probes ----
def needle(r, enc, L, depth, kind, held=False, ndist=4):
    """exactly L tokens: BOS 'User: <text with facts>\\n\\n<question>\\n\\nAssistant: <answer up to the value>'; -> ids, value ids, question, n answer-prefix tokens"""
    w = World(r, held)
    used = set()
    fs = [make_fact(w, kind, used) for _ in range(1 + ndist)]
    f = fs[0]
    vt = strip(f[4])
    pre = f[3]
    head = [0] + enc("User: "[:-1])
    val = enc(vt)
    tail = enc("\n\n" + f[1] + "\n\nAssistant:" + (" " + pre if pre else ""))
    plain = enc("\n\n" + f[1] + "\n\nAssistant:")
    if val[0] == enc(" ")[0]:
        tail = tail + val[:1]
        val = val[1:]
    facts = [enc(" " + strip(x[0])) for x in fs]
    room = L - len(head) - len(tail) - sum(map(len, facts))
    body = []
    while room > 0:
        for p in filler(w, 400):
            for s in re.split(r"(?<=[.!?\"]) (?=[A-Z\"])", strip(p)):
                body.append(enc(" " + s))
            body.append(enc("\n\n"))
        if sum(map(len, body)) >= room:
            break
    while sum(map(len, body[:-1])) >= room:
        body.pop()
    x = sum(map(len, body)) - room
    body[-1] = body[-1][: len(body[-1]) - x] if x > 0 else body[-1]
    if not body[-1]:
        body.pop()
    n = len(body)
    pos = sorted([(r.random() * n, t) for t in facts[1:]] + [(depth * n, facts[0])], key=lambda z: -z[0])
    for p_, t in pos:
        body.insert(int(p_), t)
    ids = head + [t for s in body for t in s] + tail
    assert len(ids) == L, (len(ids), L)
    return ids, val, strip(f[1]), strip(f[2]), len(tail) - len(plain)


def main(d, what, *a):
    os.makedirs(d, exist_ok=True)
    if what == "tokenizer":
        return train_tokenizer(d)
    enc = Enc(d)
    if what == "pools":
        pool_short(d, enc, int(float(a[1])), int(a[0]))
    if what == "copy":
        pool_copy(d, int(float(a[0])), 31)
    if what == "long":
        pool_long(d, enc, int(float(a[1])), int(a[0]), 50)
    if what == "heldout":
        for nm, seed, sl in (("heldout", 90001, 0), ("heldout2", 90002, 1)):
            r = random.Random(seed)
            docs = []
            for i in range(150):
                c = r.random()
                docs.append(
                    facts_doc(r, True)
                    if c < 0.25
                    else (
                        retrieval_doc(r, r.randint(300, 2500), r.randint(1, 6), True)
                        if c < 0.5
                        else story_doc(r, True) if c < 0.85 else log_doc(r, True)
                    )
                )
            syn = [t for ids, _ in enc.weighted(docs) for t in ids]
            ho = real_split()[0][sl::2]
            real = [t for x in ho for t in [0] + enc(x[:6000]) + [1]]
            np.array(syn, np.uint16).tofile(f"{d}/{nm}.syn")
            np.array(real, np.uint16).tofile(f"{d}/{nm}.real")
            print(nm, len(syn), len(real))


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[2:])
