"""Questions about the app with fixed answers, for the assistant demo model. Standard library only.

The questions and answers are in faq.txt. Three ways to ask each question never enter the training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .samples import Sample, cut_word, made_up_word, random_letters

REFUSAL = ("I am only a small demo model and do not know that. "
           "Choose a bigger model on the Models page, or ask me about this app.")

FOREIGN = ["who is the president of {w}", "what is the capital of {w}", "write a poem about {w}", "tell me about {w}",
           "what is {w}", "how do I cook {w}", "translate {w}", "where is {w}", "when was {w} built",
           "why is {w} so famous", "who wrote {w}", "how old is {w}", "explain {w}", "how does {w} work",
           "what does {w} mean", "can you explain {w}", "what is the best {w}", "give me a recipe for {w}",
           "who is {w}",
           "how far is {w}", "what is the weather in {w}", "who won {w}", "recommend {w}", "how much does {w} cost",
           "what is the history of {w}", "write a story about {w}", "how many people live in {w}", "I like {w}",
           "what is the population of {w}", "how do I learn {w}", "where can I buy {w}", "should I buy {w}",
           "why is {w} important", "what are {w}", "how do I fix {w}", "what color is {w}", "when is {w}",
           "how tall is {w}", "what do you think about {w}", "write an email about {w}", "how do I make {w}",
           "what happened in {w}", "do you like {w}", "which {w} is better", "is {w} healthy", "sing {w}", "play {w}",
           "what is {n} plus {m}", "what time is it", "what day is it", "is {n} a prime number", "how do I get to {w}",
           "who invented {w}", "how do I lose weight", "I am bored", "I am hungry", "can {w} fly", "plan a trip to {w}",
           "summarize {w}", "name three {w}", "draw {w}", "how do I grow {w}", "does {w} hurt", "can I eat {w}"]
THINGS = ("France,Italy,the moon,the sun,cats,dogs,Paris,Rome,pizza,bread,rice,soup,football,chess,music,Mozart,"
          "Shakespeare,a car,the train,trees,flowers,history,physics,the weather,winter,summer,gold,water,the ocean,"
          "Berlin,China,India,Brazil,a book,a film,coffee,tea,milk,love,time,space,god,money,taxes,birds,horses,fish,"
          "my boss,a wedding,Spanish,German,the war,politics,religion,a guitar,a bike,a house,gravity,energy,"
          "evolution,my cat,my homework,a star,chemistry,Napoleon,bitcoin,a dream,the heart,cancer,shoes").split(",")
FOREIGN_HELD_OUT = ["what is the capital of Norway", "how do I cook pasta", "who won the world cup",
                    "write a song about rain", "what is the tallest mountain", "tell me about dinosaurs",
                    "who is Albert Einstein", "translate butterfly", "where is Tokyo", "how many legs has a spider",
                    "what is the speed of light", "Who painted the Mona Lisa", "Why is the blue",
                    "give me fitness advice", "what should I cook tonight", "is Pluto a planet",
                    "how do vaccines work", "What is the boiling point of water", "who was Cleopatra",
                    "compose a letter to my landlord", "What year did Rome fall", "how deep is the sea",
                    "which sport is the oldest", "do aliens exist", "what are good names for a baby",
                    "who is the richest person", "how do bees make honey", "what's the news today",
                    "will it rain tomorrow", "Describe the water cycle", "is coffee bad for me",
                    "how do I repair a bicycle", "what is the meaning of life", "tell me a fairy tale",
                    "which planet is the largest", "how do I tie a tie", "Solve x squared equals 9",
                    "what is photosynthesis", "when did the Titanic sink", "who sings Yesterday",
                    "recommend a good book", "how long is the Nile", "what do pandas eat"]
# A small grammar on top of the templates: most off-domain questions should be unlike each other.
NOUNS = ("river lake island forest desert valley village king queen emperor general painter singer actor writer poet "
         "scientist doctor nurse teacher farmer lawyer pilot sailor soldier baker wolf lion tiger elephant whale shark "
         "snake lizard frog ant butter cheese apple banana lemon potato tomato onion carrot sugar salt pepper "
         "sandwich salad dinner breakfast lunch kitchen bedroom roof door window carpet chair sofa lamp oven fridge "
         "engine wheel plane ship rocket satellite comet galaxy universe atom molecule acid metal iron copper silver "
         "diamond sand stone cloud storm thunder snow ice wind fire smoke virus bacteria blood bone skin brain tooth "
         "muscle stomach pill hospital school college exam grade essay novel drama opera dance violin piano drum "
         "painting statue museum castle church temple tower bridge road subway airport hotel beach vacation passport "
         "ticket market bank loan salary interest stock company job interview lawsuit election president minister "
         "parliament treaty revolution empire century volcano earthquake flood planet sunset season holiday "
         "birthday present toy puppy kitten garden flower seed grass wood paper pencil shirt jacket hat coat dress "
         "marathon tennis golf hockey swimming yoga medal champion team coach stadium goal puzzle riddle magic ghost "
         "angel heaven dream sleep memory fear anger joy sadness friend brother sister mother uncle baby child").split()
ADJECTIVES = ("big small old young fast slow hot cold rich poor famous strong weak heavy deep high long short "
              "wide loud "
              "bright dark sweet sour healthy dangerous rare cheap expensive beautiful ugly clever happy smart red "
              "green wild ancient modern biggest smallest oldest youngest fastest hottest coldest strongest heaviest "
              "longest shortest loudest sweetest rarest cheapest smartest").split()
VERBS = ("cook bake boil fry eat drink build paint sing dance write draw fly swim run jump grow plant cut wash clean "
         "repair fix sell buy rent win lose fight discover invent found sink burn freeze melt explode sleep dream "
         "die live marry raise feed train catch hunt travel visit climb drive ride measure solve prove teach study "
         "translate spell pronounce define wear knit sew fold throw kick").split()
SHAPES = ["who {v}ed the {n}", "why do {n}s {v}", "how do {n}s {v}", "can a {n} {v}", "what is the {a} {n}",
          "which {n} is the {a}", "is the {n} {a}", "how {a} is the {n}", "how do I {v} a {n}", "how to {v} {n}s",
          "when did the {n} {v}", "where do {n}s {v}", "what do {n}s {v}", "does a {n} {v}", "will the {n} {v} soon",
          "should I {v} my {n}", "tell me a {n} fact", "give me {n} tips", "I want to {v} a {n}", "my {n} is {a}",
          "what should I {v} today", "why is the {n} {a}", "who is the {a} {n} of {w}", "name a {a} {n}",
          "what is the {n} of {w}", "what is the {n} of the {n}", "how many {n}s has a {n}", "how many {n}s are there",
          "was {w} a {n}", "is {w} a {n}", "is a {n} a {n}", "in what year did {w} {v}", "write a {a} {n} for me",
          "{v} {w} for me", "help me {v} the {n}", "what are some {a} {n}s", "describe the {n}", "are {n}s {a}",
          "what's the {n} this week", "how long does a {n} {v}", "who {v}s {w}", "how much is a {n}", "{n}",
          "the {a} {n}", "{v} a {n}", "do you {v}", "compare {n} and {n}", "what is {w} {n}", "a {n} about {w}",
          "who was {w}", "where was {w} born", "did {w} {v}", "when will {w} {v}", "best {n} in {w}", "{w}"]

BEFORE = ["", "", "", "", "hey, ", "hi, ", "please tell me ", "can you tell me ", "tell me, ", "quick question: ",
          "so ",
          "ok, ", "I want to know ", "could you say ", "please, ", "excuse me, ", "um, "]
AFTER = ["", "", "", "?", "?", "?", ".", " please", " please?", "??", "!", " in this app?", " here?", " in Turntable?"]
SWAPS = {"how do I": ["how can I", "how to", "how would I", "how should I", "what is the way to", "how could I"],
         "what is": ["what's", "whats", "explain", "tell me about", "can you explain", "describe"],
         "what are": ["explain", "tell me about", "what're"], "what does": ["what would", "what do", "what did"],
         "which": ["what"], "the ": ["", "my ", "the "],
         "can I": ["could I", "may I", "is it possible to", "am I able to"],
         "explain": ["describe", "can you explain", "please explain", "what is"],
         "where is": ["where can I find", "I can't find"],
         "where do I": ["where can I", "where should I"], "conversation": ["chat"], "chat": ["conversation"],
         "delete": ["remove", "erase"], "start": ["launch", "run"], "the app": ["it", "Turntable", "this app"],
         "picture": ["image"], "image": ["picture", "photo"], "fits": ["can I run", "can I load"],
         "another": ["a different"]}


@dataclass(frozen=True)
class Intent:
    """One thing the model knows."""

    key: str
    answer: str
    questions: list[str]
    held_out: list[str]


@cache
def intents() -> tuple[Intent, ...]:
    """The blocks of faq.txt."""
    text = (Path(__file__).with_name("faq.txt")).read_text(encoding="utf-8")
    out = []
    for block in text.split("\n# ")[1:]:
        key, answer, train, test = block.strip().split("\n")
        out.append(Intent(key, answer, train[2:].split(" | "), test[2:].split(" | ")))
    return tuple(out)


@cache
def added_questions() -> dict[str, list[str]]:
    """More ways to ask, by intent, for the second stage."""
    text = (Path(__file__).with_name("faq_more.txt")).read_text(encoding="utf-8")
    pairs = (line.split(": ", 1) for line in text.splitlines() if line and not line.startswith("More"))
    return {key: questions.split(" | ") for key, questions in pairs}


@cache
def held_out_questions() -> frozenset[str]:
    return frozenset(q.lower() for i in intents() for q in i.held_out) | {q.lower() for q in FOREIGN_HELD_OUT}


def reword(rng: random.Random, question: str) -> str:
    """Synonyms, a dropped word, words around it, letter case, and now and then a typo."""
    for _ in range(rng.choice([0, 1, 1, 2])):
        found = [old for old in SWAPS if old in question]
        if found:
            old = rng.choice(found)
            question = question.replace(old, rng.choice(SWAPS[old]), 1)
    words = question.split()
    if len(words) > 4 and rng.random() < 0.3:
        words.pop(rng.randrange(len(words)))
    question = " ".join(words)
    if rng.random() < 0.5:
        question = rng.choice(BEFORE) + question
    question += rng.choice(AFTER)
    if rng.random() < 0.08 and len(question) > 8:
        at = rng.randrange(1, len(question) - 2)
        question = question[:at] + question[at + 1] + question[at] + question[at + 2:]
    roll = rng.random()
    if roll < 0.45:
        return question[:1].upper() + question[1:]
    return question.lower() if roll < 0.6 else question


def foreign_question(rng: random.Random) -> str:
    """A question that has nothing to do with the app."""
    roll = rng.random()
    if roll < 0.4:
        thing = rng.choice(THINGS)
    else:
        thing = rng.choice([made_up_word(rng), cut_word(rng, NOUNS), cut_word(rng, NOUNS), random_letters(rng, 3, 8)])
        thing = thing.capitalize() if rng.random() < 0.5 else thing
    text = rng.choice(FOREIGN if rng.random() < 0.4 else SHAPES)
    while "{n}" in text and text in SHAPES:
        text = text.replace("{n}", rng.choice(NOUNS), 1) if text.count("{n}") > 1 else text.format(
            n=rng.choice(NOUNS) if rng.random() < 0.7 else cut_word(rng, NOUNS), a=rng.choice(ADJECTIVES),
            v=rng.choice(VERBS), w=thing)
    return text.format(w=thing, n=rng.randint(2, 99), m=rng.randint(2, 99), a=rng.choice(ADJECTIVES),
                       v=rng.choice(VERBS))


def second_stage(rng: random.Random) -> Sample:
    """As in the first stage, but with fewer refusals and with the added questions of faq_more.txt."""
    return training_sample(rng, foreign_share=0.27, more=True)


def training_sample(rng: random.Random, foreign_share: float = 0.35, more: bool = False) -> Sample:
    """The next training sample: a known question, or one from somewhere else with the refusal."""
    while True:
        if rng.random() < foreign_share:
            question = foreign_question(rng)
            answer, kind = REFUSAL, "refusal"
        else:
            intent = rng.choice(intents())
            questions = intent.questions + (added_questions().get(intent.key, []) if more else [])
            question, answer, kind = rng.choice(questions), intent.answer, intent.key
        question = reword(rng, question)
        if question.lower().strip(" ?.!") not in held_out_questions():
            return Sample(question, answer, kind=kind)


def test_set() -> list[Sample]:
    """The held-out ways to ask, as people type them: half with a capital, half with a question mark."""
    rng = random.Random(7)
    out = []
    for intent in intents():
        for text in intent.held_out:
            text = text[:1].upper() + text[1:] if rng.random() < 0.5 else text
            out.append(Sample(text + rng.choice(["", "?"]), intent.answer, kind=intent.key))
    return out


def foreign_set() -> list[Sample]:
    return [Sample(text[:1].upper() + text[1:] + "?", REFUSAL, kind="refusal") for text in FOREIGN_HELD_OUT]


def is_right(sample: Sample, answer: str) -> bool:
    """The answers are fixed texts, so only the exact text counts."""
    return answer.strip() == sample.answer
