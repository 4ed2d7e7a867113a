"""Short number stories with worked steps, for the reasoning demo model. Standard library only.

About a tenth of the number tuples of each kind of story is kept for the tests.
"""

from __future__ import annotations

import random
import re

from .assistant import NOUNS
from .samples import Sample, cut_word, held_out, made_up_word, random_letters, small_talk, vary_writing

NAMES = ("Anna Ben Carla David Emma Felix Grace Hugo Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Wendy "
         "Tom Lucy Max").split()
ITEMS = ("apples pens books coins cards shells stamps marbles cookies eggs bottles flowers stickers balls oranges "
         "candles keys buttons tickets stones").split()
MORE_ITEMS = ("hats cups plates forks knives boots shoes socks trees rings beads bells kites drums masks tools nails "
              "screws ropes wheels ducks sheep goats hens geese cherries plums peaches grapes figs nuts beans "
              "peas onions "
              "potatoes tomatoes peppers muffins donuts pies rolls loaves cheeses sandwiches pizzas bulbs lamps chairs "
              "tables boards sticks leaves roses tulips seeds roots feathers pebbles rocks crystals diamonds pearls "
              "letters papers posters pictures photos maps magazines comics puzzles dolls robots trains trucks bikes "
              "boats ships planes blocks tiles sheets towels blankets pillows brushes combs mirrors clocks watches "
              "croissants barrels bottlecaps carnations melodies spinners spools swans teeth feet tooth "
              "points tokens chips crayons pencils markers erasers rulers notebooks bolts cables wires phones screens "
              "worms bees ants frogs fish kittens puppies rabbits hamsters parrots snakes turtles foxes wolves").split()
TEST_NAMES = "Zuzanna Bob Mary Oskar Priya Quentin Alice Yusuf Ingrid Chloe John Sven".split()
TEST_ITEMS = "lemons melons pears bananas cars bricks sweets carrots toys spoons plants cakes".split()
BOXES = "boxes bags baskets shelves jars crates".split()

REFUSAL_TEXT = ("I can only add, subtract and multiply small numbers in short stories. "
                "Choose a bigger model on the Models page for other questions.")


def thought(steps: str, answer: str) -> str:
    return f"<think>\n{steps}\n</think>\n\n{answer}"


REFUSAL = thought("This is not a number problem I know.", REFUSAL_TEXT)
HELLO = thought("This is a greeting.", "Hello! Give me a small number problem, for example 17 + 25.")
WELCOME = thought("This is a word of thanks.", "You are welcome!")

FOREIGN = ["who is the president of {w}", "what is the capital of {w}", "write a poem about {w}", "tell me about {w}",
           "what is {w}", "how do I cook {w}", "where is {w}", "write a function that sorts {w}", "what are {w}",
           "why is {w} so famous", "how many legs do {w} have", "how old is {w}", "how far is {w}", "who wrote {w}",
           "what is the square root of {n}", "is {n} a prime number", "solve {n}x = {m}", "translate {w}",
           "what is {n} percent of {m}", "how many days are in {w}", "when is {w}", "who are you", "what can you do",
           "tell me a joke", "what time is it", "explain {w}", "what is {n} divided by {m}", "{n} / {m}",
           "how many people live in {w}", "when was {w} invented", "who is {w}", "how tall is {w}",
           "what does {w} mean",
           "give me a recipe for {w}", "which is the best {w}", "can you help me with {w}", "do you like {w}",
           "how do I learn {w}", "write a story about {w}", "what is the color of {w}", "how does {w} work",
           "summarize {w}", "name three {w}", "who won {w}", "how much does {w} cost", "is {w} healthy",
           "what is the weather in {w}", "make a list of {w}", "what happened in {w}", "sort {n}, {m} and 5",
           "the derivative of {w}", "draw {w}", "play {w}", "recommend {w}", "fix my {w}", "why do {w} sleep"]
THINGS = ("France,Italy,the moon,cats,dogs,Paris,Rome,pizza,bread,football,music,Mozart,a car,trees,history,physics,"
          "winter,gold,water,the ocean,Berlin,China,a book,coffee,milk,birds,horses,a bridge,London,a river,spiders,"
          "a year,May,Easter,a list,the sun,Python,a movie,rice,Newton,love,energy,my dog,a house,Spanish,the war,"
          "a garden,the earth,medicine,planes").split(",")
FOREIGN_HELD_OUT = ["What is the capital of Norway?", "tell me about dinosaurs", "How many legs do cows have?",
                    "Write a poem about rain.", "what is the square root of 81?", "how many days are in April?",
                    "Who is Einstein?", "Could you recommend a good film?", "What is the boiling point of water?",
                    "Who painted the Mona Lisa?", "Explain photosynthesis", "Is 91 prime?", "Why is the sky blue?",
                    "How do airplanes fly?", "What is the meaning of life?", "Give me some advice on sleeping",
                    "Which language is spoken in Brazil?", "Say something in German", "I feel sad today",
                    "what's the tallest mountain", "Convert 5 miles to kilometers", "What is 20 percent of 50?",
                    "Integrate x squared", "Who discovered America?", "Name a planet", "how to bake a cake",
                    "What year did the war end?", "Write an email to my boss", "do my homework",
                    "Sing a lullaby", "what is a black hole", "Tell me a secret", "How long does an egg boil?",
                    "Can fish drink?", "Plan a trip to Japan", "what should I wear", "Write Python code for a game",
                    "Which animal is the fastest?", "Compare tea and juice", "Is it going to snow tomorrow?"]


def add_steps(a: int, b: int) -> str:
    """Column addition, lowest digit first."""
    width = max(len(str(a)), len(str(b)))
    carry, out = 0, []
    for x, y in zip(reversed(str(a).zfill(width)), reversed(str(b).zfill(width)), strict=True):
        total = int(x) + int(y) + carry
        out.append(f"{x}+{y}" + (f"+{carry}" if carry else "") + f"={total}" + (" carry 1" if total > 9 else ""))
        carry = total // 10
    return f"Add {a} and {b}. " + ", ".join(out) + f", so {a}+{b}={a + b}."


def subtract_steps(a: int, b: int) -> str:
    """Column subtraction with borrows, lowest digit first."""
    borrow, out = 0, []
    for x, y in zip(reversed(str(a)), reversed(str(b).zfill(len(str(a)))), strict=True):
        rest = int(x) - int(y) - borrow
        minus = f"-{borrow}" if borrow else ""
        borrow = 1 if rest < 0 else 0
        out.append(f"1{x}-{y}{minus}={rest + 10} borrow 1" if borrow else f"{x}-{y}{minus}={rest}")
    return f"Take {b} from {a}. " + ", ".join(out) + f", so {a}-{b}={a - b}."


def multiply_steps(a: int, b: int) -> str:
    """Digits of `a` times the single digit `b`, with carries."""
    carry, out = 0, []
    for x in reversed(str(a)):
        product = int(x) * b
        text = f"{x}*{b}={product}" + (f", {product}+{carry}={product + carry}" if carry else "")
        carry = (product + carry) // 10
        out.append(text + (f" carry {carry}" if carry else ""))
    return f"Multiply {a} by {b}. " + ", ".join(out) + f", so {a}*{b}={a * b}."


def has_hard_borrow(a: int, b: int) -> bool:
    """A borrow that itself causes the next borrow: rare by chance, so training draws it more often."""
    borrow = 0
    for x, y in zip(reversed(str(a)), reversed(str(b).zfill(len(str(a)))), strict=True):
        rest = int(x) - int(y)
        if borrow and rest in (0, 1):
            return True
        borrow = 1 if rest - borrow < 0 else 0
    return False


ADD = ["{n} has {a} {i}. {m} gives {n} {b} more. How many {i} does {n} have now?",
       "{n} has {a} {i} and buys {b} more. How many {i} does {n} have?",
       "{n} has {a} {i} and finds {b} more. How many {i} does {n} have now?",
       "There are {a} {i} on the table and {b} {i} on the floor. How many {i} are there in total?",
       "{n} has {a} {i} and {m} has {b} {i}. How many {i} do they have together?"]
SUBTRACT = ["{n} has {a} {i} and gives {b} to {m}. How many {i} are left?",
            "{n} has {a} {i} and eats {b}. How many {i} are left?",
            "{n} had {a} {i}. {b} of them were lost. How many {i} does {n} have now?",
            "{n} has {a} {i} and loses {b}. How many {i} does {n} have now?",
            "A shop has {a} {i} and sells {b}. How many {i} remain?",
            "{n} has {a} {i} and {m} has {b} {i}. How many more {i} does {n} have than {m}?",
            "{n} has {a} {i}. {m} has {b}. What is the difference?"]
MULTIPLY = ["{n} has {b} {x} with {a} {i} in each. How many {i} are there in total?",
            "Each of {b} {x} holds {a} {i}. How many {i} is that?",
            "There are {b} {x} with {a} {i} in each. How many {i} are there?",
            "{n} buys {a} {i} every day for {b} days. How many {i} does {n} buy?"]
MULTIPLY_ADD = ["{n} has {b} {x} with {a} {i} in each and {c} more {i}. How many {i} does {n} have in total?"]
MULTIPLY_TAKE = ["{n} has {b} {x} with {a} {i} in each and gives away {c} {i}. How many {i} are left?",
                 "{n} has {b} {x} with {a} {i} in each and gives away {c}. How many {i} are left?",
                 "There are {b} {x} with {a} {i} in each. {m} takes {c} {i}. How many {i} remain?"]
ADD_TAKE = ["{n} has {a} {i}, finds {b} more and gives {c} to {m}. How many {i} does {n} have now?",
            "{n} has {a} {i}. {m} gives {n} {b} more. Then {n} loses {c}. How many {i} are left?"]
ADD_ADD = ["{n} collects {a} {i} on Monday, {b} on Tuesday and {c} on Wednesday. How many {i} is that in total?"]
STORIES = {"+": ADD, "-": SUBTRACT, "*": MULTIPLY, "*+": MULTIPLY_ADD, "*-": MULTIPLY_TAKE, "+-": ADD_TAKE,
           "++": ADD_ADD}
BARE = ["What is {}?", "Calculate {}.", "How much is {}?", "{} = ?", "{}", "{}=", "{}?", "{} =", "what's {}?",
        "compute {}"]
SIGNS = {"+": ["+", " + ", " + ", " plus "], "-": ["-", " - ", " - ", " minus "],
         "*": ["*", " * ", " * ", " times ", " x ", "x"]}
STEPS = {"+": add_steps, "-": subtract_steps, "*": multiply_steps}
VALUE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def numbers(rng: random.Random, kind: str, test: bool) -> tuple[int, int, int]:
    """Numbers for the kind with a positive result, from the half (training or test) that is asked for."""
    while True:
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        if kind[0] == "*":
            b = rng.randint(2, 9)
        elif len(kind) == 1 and not test and rng.random() < 0.12:
            a, b = rng.randint(2, 999), rng.randint(2, 999)
        if kind == "-" and a < b:
            a, b = b, a
        first = VALUE[kind[0]](a, b)
        last = VALUE[kind[1]](first, c) if len(kind) == 2 else first
        key = (a, b) if len(kind) == 1 else (a, b, c)
        if last < 1 or held_out(0.1, kind, *key) != test:
            continue
        taken = {"-": (a, b)}.get(kind) or ((first, c) if kind.endswith("-") else None)
        if taken and not test and rng.random() < 0.4 and not has_hard_borrow(*taken):
            continue
        return a, b, c


def work(kind: str, a: int, b: int, c: int) -> tuple[str, int]:
    """The written steps and the result."""
    value = VALUE[kind[0]](a, b)
    steps = STEPS[kind[0]](a, b)
    if len(kind) == 1:
        return steps, value
    return steps + "\n" + STEPS[kind[1]](value, c), VALUE[kind[1]](value, c)


def new_name(rng: random.Random) -> str:
    word = made_up_word(rng) if rng.random() < 0.6 else random_letters(rng, 2, 8)
    return word.capitalize()


def changed_item(rng: random.Random) -> str:
    """The beginning of a known word with another end: stops the model from finishing words by habit."""
    word = rng.choice([*MORE_ITEMS, *ITEMS, *NOUNS])
    ends = ["s", "rs", "ls", "ts", "es", "ns", "cks", "ds", "nes", "ters", "rrows", "ns", "lls", "oks", "ars", "eets"]
    return word[:rng.randint(1, 6)] + rng.choice(["", "", rng.choice("aeiou"), rng.choice("lmnrst")]) + rng.choice(ends)


def new_item(rng: random.Random, second: bool = False) -> str:
    if second and rng.random() < 0.6:
        return changed_item(rng)
    roll = rng.random()
    if roll < 0.4:
        return rng.choice(MORE_ITEMS)
    if roll < 0.6:
        word = cut_word(rng, [*FOREIGN, *THINGS, *MORE_ITEMS, *NAMES])
    else:
        word = made_up_word(rng) if roll < 0.8 else random_letters(rng, 2, 7)
    return word + rng.choice(["s", "s", "es", "ns", "ts"])


def story(rng: random.Random, kind: str, test: bool, second: bool = False) -> Sample:
    """A story of the kind. Half of the names and things are unknown words, in training and in tests."""
    unknown = rng.random() < (0.75 if second else 0.5)
    if unknown:
        one, two = rng.sample(TEST_NAMES, 2) if test else (new_name(rng), new_name(rng))
        item = rng.choice(TEST_ITEMS) if test else new_item(rng, second)
        if not test and item in TEST_ITEMS:
            return story(rng, kind, test, second)
    else:
        one, two = rng.sample(NAMES, 2)
        item = rng.choice(ITEMS)
    a, b, c = numbers(rng, kind, test)
    steps, result = work(kind, a, b, c)
    question = rng.choice(STORIES[kind]).format(n=one, m=two, i=item, x=rng.choice(BOXES), a=a, b=b, c=c)
    return Sample(question, thought(steps, f"The answer is {result} {item}."), (result, item), kind)


def bare(rng: random.Random, test: bool) -> Sample:
    """A sum without a story, with or without blanks."""
    kind = rng.choice("+-*")
    a, b, _ = numbers(rng, kind, test)
    steps, result = work(kind, a, b, 0)
    # Both orders of a product; with one digit on each side the order of the steps would be a guess.
    left, right = (b, a) if kind == "*" and a > 9 and rng.random() < 0.4 else (a, b)
    question = rng.choice(BARE).format(f"{left}{rng.choice(SIGNS[kind])}{right}")
    return Sample(question, thought(steps, f"The answer is {result}."), (result, ""), "bare")


def problem(rng: random.Random, test: bool = False, second: bool = False) -> Sample:
    kind = rng.choice([*STORIES, "bare", "bare", "-"])
    return bare(rng, test) if kind == "bare" else story(rng, kind, test, second)


def second_stage(rng: random.Random) -> Sample:
    """As in the first stage, but with more unknown words to copy."""
    return training_sample(rng, second=True)


def training_sample(rng: random.Random, second: bool = False) -> Sample:
    """The next training sample: a problem, a refusal or small talk."""
    roll = rng.random()
    if roll < 0.1:
        thing = rng.choice(THINGS) if rng.random() < 0.7 else made_up_word(rng)
        text = rng.choice(FOREIGN).format(w=thing, n=rng.randint(2, 99), m=rng.randint(2, 99))
        return Sample(vary_writing(rng, text), REFUSAL, kind="refusal")
    if roll < 0.12:
        return small_talk(rng, HELLO, WELCOME)
    sample = problem(rng, second=second)
    if rng.random() < 0.06:
        return Sample(sample.question.lower().rstrip("?."), sample.answer, sample.facts, sample.kind)
    return sample


def test_set(count: int = 500, seed: int = 4242) -> list[Sample]:
    rng = random.Random(seed)
    return [problem(rng, test=True) for _ in range(count)]


def foreign_set() -> list[Sample]:
    return [Sample(text, REFUSAL, kind="refusal") for text in FOREIGN_HELD_OUT]


def is_right(sample: Sample, answer: str) -> bool:
    """The number and the thing count; a refusal must be the refusal."""
    if sample.facts is None:
        return answer.strip() == sample.answer
    result, item = sample.facts
    found = re.search(r"The answer is (-?\d+)(?: (\w+))?\.", answer.split("</think>")[-1])
    return bool(found and "<think>" in answer and int(found.group(1)) == result and (found.group(2) or "") == item)
