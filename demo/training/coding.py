"""Requests for small Python functions, for the coding demo model. Standard library only.

Combinations of task, wording and sentence are kept for the tests, and so are all the function names in TEST_NAMES.
The checker runs the answered code, so it is for our own models on our own questions only.
"""

from __future__ import annotations

import keyword
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .samples import Sample, cut_word, held_out, made_up_word, random_letters, small_talk, vary_writing

REFUSAL = ("I only know small functions on numbers, lists and strings. "
           "Choose a bigger model on the Models page for other code.")
HELLO = "Hello! Ask me for a small Python function, for example one that checks if a number is prime."
WELCOME = "You are welcome!"


@dataclass(frozen=True)
class Task:
    """One kind of function. `shape`: P two numbers, A one number, L a list, S a text; K adds a constant."""

    shape: str
    name: str
    wordings: list[str]
    body: list[str]
    works: Callable[..., Any]


def _task(shape: str, name: str, wordings: str, body: str, works: Callable[..., Any]) -> Task:
    return Task(shape, name, wordings.split(" | "), body.split("\n"), works)


_BEST = "best = {a}[0]\nfor item in {a}:\n    if item %s best:\n        best = item\nreturn best"
TASKS = [
    _task("P", "add", "adds two numbers | returns the sum of two numbers | takes two numbers and adds them",
          "return {a} + {b}", lambda f: f(2, 3) == 5 and f(-1, 9) == 8),
    _task("P", "subtract", "subtracts the second number from the first | returns the difference of two numbers",
          "return {a} - {b}", lambda f: f(9, 3) == 6),
    _task("P", "multiply", "multiplies two numbers | returns the product of two numbers",
          "return {a} * {b}", lambda f: f(4, 3) == 12),
    _task("P", "safe_divide", "divides two numbers and returns None on division by zero | "
          "divides the first number by the second but returns None if the second is zero",
          "if {b} == 0:\n    return None\nreturn {a} / {b}", lambda f: f(6, 3) == 2 and f(1, 0) is None),
    _task("P", "larger", "returns the larger of two numbers | finds the bigger of two numbers",
          "if {a} > {b}:\n    return {a}\nreturn {b}", lambda f: f(6, 3) == 6 and f(1, 2) == 2),
    _task("P", "gcd", "computes the greatest common divisor of two numbers | returns the gcd of two integers",
          "while {b}:\n    {a}, {b} = {b}, {a} % {b}\nreturn {a}", lambda f: f(12, 18) == 6),
    _task("P", "power", "raises the first number to the power of the second | "
          "returns the first number to the power of the second", "return {a} ** {b}", lambda f: f(2, 5) == 32),
    _task("A", "square", "squares a number | returns the square of a number", "return {a} * {a}", lambda f: f(7) == 49),
    _task("A", "cube", "cubes a number | returns the cube of a number", "return {a} ** 3", lambda f: f(3) == 27),
    _task("A", "is_even", "checks if a number is even | returns True when a number is even",
          "return {a} % 2 == 0", lambda f: f(4) is True and f(3) is False),
    _task("A", "is_odd", "checks if a number is odd | returns True when a number is odd",
          "return {a} % 2 == 1", lambda f: f(3) is True and f(4) is False),
    _task("A", "factorial", "computes the factorial of a number | returns the factorial of n",
          "result = 1\nfor i in range(2, {a} + 1):\n    result *= i\nreturn result",
          lambda f: f(5) == 120 and f(0) == 1),
    _task("A", "fibonacci", "returns the n-th Fibonacci number | computes a Fibonacci number",
          "first, second = 0, 1\nfor _ in range({a}):\n    first, second = second, first + second\nreturn first",
          lambda f: f(10) == 55),
    _task("A", "is_prime", "checks if a number is prime | tests whether a number is a prime",
          "if {a} < 2:\n    return False\nfor i in range(2, int({a} ** 0.5) + 1):\n    if {a} % i == 0:\n"
          "        return False\nreturn True", lambda f: f(7) and not f(9) and not f(1)),
    _task("A", "to_fahrenheit", "converts Celsius to Fahrenheit | turns a temperature in Celsius into Fahrenheit",
          "return {a} * 9 / 5 + 32", lambda f: f(100) == 212),
    _task("A", "to_celsius", "converts Fahrenheit to Celsius | turns a temperature in Fahrenheit into Celsius",
          "return ({a} - 32) * 5 / 9", lambda f: f(212) == 100),
    _task("A", "digit_sum", "adds up the digits of a number | returns the sum of the digits of a number",
          "return sum(int(d) for d in str({a}))", lambda f: f(123) == 6),
    _task("AK", "add_{k}", "adds {k} to a number | returns a number plus {k}",
          "return {a} + {k}", lambda f, k: f(10) == 10 + k),
    _task("AK", "times_{k}", "multiplies a number by {k} | returns a number times {k}",
          "return {a} * {k}", lambda f, k: f(10) == 10 * k),
    _task("AK", "divisible_by_{k}", "checks if a number is divisible by {k} | "
          "returns True when a number is a multiple of {k}",
          "return {a} % {k} == 0", lambda f, k: f(3 * k) is True and (k == 1 or f(3 * k + 1) is False)),
    _task("L", "total", "sums a list of numbers | returns the sum of a list",
          "total = 0\nfor item in {a}:\n    total += item\nreturn total", lambda f: f([1, 2, 3]) == 6),
    _task("L", "average", "computes the average of a list | returns the mean of a list of numbers",
          "if not {a}:\n    return 0\nreturn sum({a}) / len({a})", lambda f: f([1, 2, 3]) == 2 and f([]) == 0),
    _task("L", "largest", "finds the largest number in a list | returns the maximum of a list",
          _BEST % ">", lambda f: f([1, 5, 3]) == 5),
    _task("L", "smallest", "finds the smallest number in a list | returns the minimum of a list",
          _BEST % "<", lambda f: f([4, 2, 3]) == 2),
    _task("L", "keep_even", "keeps only the even numbers of a list | filters the even numbers from a list",
          "return [item for item in {a} if item % 2 == 0]", lambda f: f([1, 2, 4]) == [2, 4]),
    _task("L", "unique", "removes duplicates from a list and keeps the order | "
          "drops repeated items from a list in order",
          "seen = set()\nresult = []\nfor item in {a}:\n    if item not in seen:\n        seen.add(item)\n"
          "        result.append(item)\nreturn result", lambda f: f([3, 1, 3, 2]) == [3, 1, 2]),
    _task("L", "sort_list", "sorts a list in ascending order | returns a sorted copy of a list",
          "return sorted({a})", lambda f: f([3, 1, 2]) == [1, 2, 3]),
    _task("L", "sort_down", "sorts a list in descending order | sorts a list from high to low",
          "return sorted({a}, reverse=True)", lambda f: f([3, 1, 2]) == [3, 2, 1]),
    _task("L", "reverse_list", "reverses a list | returns a list in reverse order",
          "return {a}[::-1]", lambda f: f([1, 2]) == [2, 1]),
    _task("LK", "above_{k}", "keeps the numbers greater than {k} in a list | filters a list to numbers above {k}",
          "return [item for item in {a} if item > {k}]", lambda f, k: f([k - 1, k, k + 1]) == [k + 1]),
    _task("LK", "count_{k}", "counts how often {k} appears in a list | returns how many times {k} is in a list",
          "return {a}.count({k})", lambda f, k: f([k, 0, k]) == 2),
    _task("LK", "first_{k}", "returns the first {k} items of a list | takes the first {k} elements of a list",
          "return {a}[:{k}]", lambda f, k: f(list(range(200))) == list(range(k))),
    _task("S", "reverse_string", "reverses a string | returns a string backwards",
          "return {a}[::-1]", lambda f: f("abc") == "cba"),
    _task("S", "is_palindrome", "checks if a string is a palindrome | tests whether a word is a palindrome | "
          "checks for a palindrome", "cleaned = {a}.lower()\nreturn cleaned == cleaned[::-1]",
          lambda f: f("Anna") and not f("abc")),
    _task("S", "count_vowels", "counts the vowels in a string | returns the number of vowels in a text",
          "return sum(1 for c in {a}.lower() if c in 'aeiou')", lambda f: f("Hello") == 2),
    _task("S", "count_words", "counts the words in a text | returns the number of words in a string",
          "return len({a}.split())", lambda f: f("a b c") == 3),
    _task("S", "shout", "converts a string to upper case | returns a text in capital letters",
          "return {a}.upper()", lambda f: f("ab") == "AB"),
    _task("S", "greet", "greets a person by name | returns a greeting for a name",
          "return 'Hello, ' + {a} + '!'", lambda f: f("Bo") == "Hello, Bo!"),
    _task("S", "capitalize_words", "capitalizes every word of a text | makes the first letter of every word upper case",
          "return {a}.title()", lambda f: f("ab cd") == "Ab Cd"),
    _task("S", "remove_spaces", "removes all spaces from a string | deletes the spaces in a text",
          "return {a}.replace(' ', '')", lambda f: f("a b c") == "abc"),
]
ARGUMENTS = {"A": ["x", "n", "a", "num", "value", "number", "k", "v"],
             "L": ["items", "nums", "values", "data", "xs", "numbers", "lst"],
             "S": ["s", "text", "word", "name", "string", "line"]}
PAIRS = [("a", "b"), ("x", "y"), ("n", "m"), ("first", "second"), ("left", "right"), ("p", "q")]
PLAIN = ["Write a Python function that {d}.", "write a function that {d}", "Please write a Python function that {d}.",
         "I need a function that {d}.", "Can you write a Python function that {d}?",
         "Give me a Python function that {d}.", "Create a function that {d}.", "Show me Python code that {d}.",
         "Could you code a function that {d}?", "python function that {d}", "Implement a function that {d}.",
         "How do I write a function that {d}?", "a function that {d}"]
NAMED = ["Write a Python function called {f} that {d}.", "Write a function {f} that {d}.",
         "Please write {f}, a function that {d}.", "Create a Python function named {f} that {d}.",
         "I need a function named {f} that {d}.", "Implement {f}, which {d}.", "Define a function {f} which {d}.",
         "write a function called {f} that {d}"]
WORDS = ("get make find do run compute do_it build fetch eval my simple fast the new item list num text word value it "
         "now one two sum result total part step func util job main size len stuff work case out price count load save "
         "parse clean check user data tool mean max min area cost tax rate score name key map set sort plus minus "
         "double half even odd list prime digits convert temp alpha beta gamma foo bar baz qux hello test process "
         "apply handle update filter merge split join format show print read write open close calc").split()
TEST_NAMES = ["frobnicate", "zed", "calc_price", "solve2", "tally", "compute_thing", "my_helper", "quick_result",
              "data_tool", "row_total", "user_check", "get_item", "find_one", "wobble", "xyzzy", "thingamajig", "blorp",
              "crunch_numbers", "do_magic", "helper7", "snork", "kumquat", "process_it", "jump", "f1", "mapper_v2",
              "bananaSplit", "quokka", "make_sandwich", "zigzag"]

FOREIGN = ["make a quicksort in python", "write a web server", "build a snake game", "write a class for {x}",
           "write a regex for {x}", "what is the capital of {x}", "write a SQL query for {x}", "connect to a database",
           "parse {x} with python", "write a {x} in C++", "write a function that downloads {x}",
           "create a website for {x}", "explain recursion", "what is a decorator", "write a binary search",
           "train a neural network on {x}", "plot {x}", "write a merge sort", "translate {x}", "write a linked list",
           "a function that draws {x}", "write a function that sends {x}", "read a CSV file",
           "write unit tests for {x}",
           "write a poem about {x}", "write a function that encrypts {x}", "what is {x}", "tell me about {x}",
           "who is {x}", "how do I cook {x}", "write a function that predicts {x}", "write {x} in Java",
           "fix this bug", "how do I install python", "what is a list comprehension", "explain {x}",
           "write a program for {x}", "make an app for {x}", "how are classes used", "what does this code do",
           "write HTML for {x}", "create a bot for {x}", "write a function that plays {x}", "scrape {x}",
           "write a function that prints {x}", "write a function that opens {x}", "where is {x}", "sing {x}",
           "what is {n} plus {n}", "tell me a joke", "who are you", "what can you do", "how old is {x}",
           "write bash code for {x}", "make a GUI with {x}", "write a function that reads {x}", "debug {x}",
           "implement a stack", "implement a hash table", "write a javascript function for {x}", "use regex on {x}"]
THINGS = ("email addresses,France,users,XML,a calculator,a web page,an image,a shop,pictures,sales data,cats,a chart,"
          "an email,my code,the sun,a password,JSON,a file,orders,a game,weather data,a chess board,pizza,music,"
          "stock prices,a robot,a bank account,customers,a timer,the internet,a camera,dates,a map,tweets").split(",")
FOREIGN_HELD_OUT = ["write a heap sort", "build a tetris game", "What is the capital of Norway?",
                    "write a class for a car", "Create a website for my band.", "parse YAML with python",
                    "write a function that sends a text message", "Write a graph search", "explain generators",
                    "Who won the world cup?", "What is a monad?", "Set up a Django project", "refactor my module",
                    "how do I use git", "Write a compiler", "Make a Discord bot", "Solve sudoku",
                    "write a function that uploads a video", "What is the meaning of life?", "Explain async and await",
                    "Draw a histogram of ages", "Write a Rust program", "Deploy my app to a server",
                    "Write CSS for a button", "Why is the sky blue?", "What is Docker?", "create a REST API",
                    "write a bubble sort", "Simulate a pendulum", "How do I center a div?", "Compress a folder",
                    "Which laptop should I buy?", "Write a queue class", "Play chess with me", "How tall is Everest?",
                    "Recognise faces in a photo", "write a function that crawls a site", "Describe polymorphism",
                    "Give me a recipe for bread", "write a Kotlin class", "Write a haiku", "Mine some bitcoin"]


SOURCES = [w for task in TASKS for w in task.wordings] + FOREIGN + THINGS + WORDS + PLAIN


def new_name(rng: random.Random) -> str:
    """An identifier from words, syllables, plain letters or digits, so that any name can be copied."""
    def part() -> str:
        roll = rng.random()
        if roll < 0.25:
            return rng.choice(WORDS)
        if roll < 0.6:
            return cut_word(rng, SOURCES)
        return made_up_word(rng) if roll < 0.78 else random_letters(rng, 1, 9)

    name = "_".join(part() for _ in range(rng.choice([1, 1, 1, 2, 2, 3])))
    roll = rng.random()
    if roll < 0.1:
        name += str(rng.randint(0, 99))
    elif roll < 0.14:
        name += "_v" + str(rng.randint(1, 9))
    elif roll < 0.22:
        name += part().capitalize()
    return name


def usable(name: str) -> bool:
    """Neither kept for the tests nor a word that Python reserves."""
    return name not in TEST_NAMES and not keyword.iskeyword(name) and name.isidentifier()


def request(rng: random.Random, test: bool = False, named: bool | None = None) -> Sample:
    """One request with the expected function."""
    named = rng.random() < 0.55 if named is None else named
    while True:
        number = rng.randrange(len(TASKS))
        task = TASKS[number]
        wording = rng.choice(task.wordings)
        sentence = rng.choice(NAMED if named else PLAIN)
        if held_out(0.12, task.name, wording, sentence) == test:
            break
    constant = rng.randint(1, 100) if "K" in task.shape else None
    name = task.name.format(k=constant)
    if named:
        name = rng.choice(TEST_NAMES) if test else new_name(rng)
        if not test and not usable(name):
            return request(rng, test, named)
    question = sentence.format(f=name, d=wording.format(k=constant))
    a, b = ("a", "b") if task.shape == "P" else ({"A": "n", "L": "items", "S": "text"}[task.shape[0]], None)
    if rng.random() < 0.25:
        a, b = rng.choice(PAIRS) if b else (rng.choice(ARGUMENTS[task.shape[0]]), None)
        question = question.rstrip(".?") + (f". Use {a} and {b} as arguments." if b else f". Use {a} as the argument.")
    arguments = f"{a}, {b}" if b else a
    body = "\n".join("    " + line.format(a=a, b=b, k=constant) for line in task.body)
    return Sample(question, f"Here is the function:\n\n```python\ndef {name}({arguments}):\n{body}\n```",
                  (number, name, arguments, constant), "named" if named else "default name")


def vary(rng: random.Random, sample: Sample) -> Sample:
    """Another first letter or another end; names keep their letter case."""
    text = sample.question
    if rng.random() < 0.5:
        text = text.rstrip(".?") + rng.choice(["", ".", "!", " please", " please."])
    first = text.split(" ", 1)[0]
    if sample.facts and first != sample.facts[1] and rng.random() < 0.5:
        text = rng.choice([text[:1].lower(), text[:1].upper()]) + text[1:]
    return Sample(text, sample.answer, sample.facts, sample.kind)


def training_sample(rng: random.Random) -> Sample:
    """The next training sample: a function, a refusal or small talk."""
    roll = rng.random()
    if roll < 0.12:
        thing = rng.choice(THINGS) if rng.random() < 0.6 else made_up_word(rng)
        text = rng.choice(FOREIGN).format(x=thing, n=rng.randint(2, 99))
        text = rng.choice(["", "", "", "please ", "can you ", "could you "]) + text
        return Sample(vary_writing(rng, text), REFUSAL, kind="refusal")
    if roll < 0.14:
        return small_talk(rng, HELLO, WELCOME)
    sample = request(rng)
    return vary(rng, sample) if rng.random() < 0.3 else sample


def test_set(count: int = 400, seed: int = 4242) -> list[Sample]:
    """Half with a function name that training never has, half with the usual name."""
    rng = random.Random(seed)
    return [request(rng, test=True, named=number % 2 == 0) for number in range(count)]


def foreign_set() -> list[Sample]:
    return [Sample(text, REFUSAL, kind="refusal") for text in FOREIGN_HELD_OUT]


def is_right(sample: Sample, answer: str) -> bool:
    """Runs the function of the answer; its name and arguments must be the wanted ones."""
    if sample.facts is None:
        return answer.strip() == sample.answer
    number, name, arguments, constant = sample.facts
    found = re.search(r"```python\n(.*?)```", answer, re.S)
    if not found or f"def {name}({arguments}):" not in found.group(1):
        return False
    space: dict[str, Any] = {}
    try:
        exec(found.group(1), space)  # noqa: S102 - the answers of our own model
        works = TASKS[number].works
        return bool(works(space[name]) if constant is None else works(space[name], constant))
    except Exception:
        return False
