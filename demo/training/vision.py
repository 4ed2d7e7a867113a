"""Pictures of simple shapes with questions and answers, for the vision demo model. Needs pillow and numpy.

A scene has up to four shapes of seven colours and three forms in nine places. Of the 189 triples
(colour, form, place) 24 are never drawn in training; every pair of the three is.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .assistant import foreign_question
from .samples import Sample, small_talk, vary_writing

SIZE = 112
TOKENS = 16
COLOURS: dict[str, list[tuple[int, int, int]]] = {
    "red": [(220, 40, 40), (255, 0, 0), (190, 20, 30)],
    "green": [(40, 170, 60), (0, 128, 0), (0, 230, 0)],
    "blue": [(40, 80, 220), (0, 0, 255), (30, 110, 230)],
    "yellow": [(240, 210, 40), (255, 255, 0), (250, 225, 60)],
    "purple": [(140, 50, 170), (128, 0, 128), (150, 40, 200)],
    "orange": [(250, 140, 20), (255, 165, 0), (255, 120, 10)],
    "black": [(25, 25, 25), (0, 0, 0), (35, 30, 40)],
}
FORMS = ["circle", "square", "triangle"]
PLACES = ["top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"]
NUMBERS = ["no", "one", "two", "three", "four"]

REFUSAL = ("I only know the colour, shape and place of simple shapes. "
           "Choose a bigger model on the Models page for other questions.")
HELLO = "Hello! Ask me which shapes are in the picture."
WELCOME = "You are welcome!"
NOTHING = "I see no simple shape in this picture."

DESCRIBE = ["What is in the picture?", "Describe the image.", "What do you see?", "Describe this picture.",
            "What does the image show?", "What is this?", "Tell me what you see in the image.", "describe the picture",
            "What is in this image?", "What can you see?", "What's in the picture?", "describe this",
            "What shapes are there?", "Which shapes do you see?", "List the shapes.", "What shapes are in the image?",
            "What does this picture show?", "Please describe the image."]
FOREIGN = ["who painted this", "who made this picture", "read the text", "what does the text say", "is this a cat",
           "how many people are there", "what is the weather like", "where was this photo taken", "who is this",
           "what brand is it", "write a poem about the picture", "what time is it", "how old is this person",
           "translate the words", "what animal is this", "is it day or night", "make the picture bigger",
           "draw a house", "what is the capital of France", "what is 2 plus 2", "write code for this", "tell me a joke",
           "how much does it cost", "is this art", "what style is it", "which camera was used", "what is written here",
           "what is the name of this place", "is this a photo of a dog", "which city is this", "what car is this",
           "can you edit the image", "remove the background", "what breed is the dog", "what does the sign say",
           "who is in the picture", "is the man happy", "what language is this", "solve the equation",
           "what is the title of this painting", "how tall is the building", "what food is this", "is it raining"]
FOREIGN_HELD_OUT = ["who took this photo", "read what is written", "is there a dog", "what city is in the picture",
                    "how many cars are there", "what is the capital of Norway", "who is the painter", "is it winter",
                    "write a story about it", "what language is the text", "how heavy is it", "which flower is this",
                    "is this person smiling", "add a hat to it", "what does the label say", "who owns this house",
                    "what is 7 times 8", "which year was it made", "is this a famous painting", "what tree is this",
                    "sing a song", "how old is the woman", "what is on the menu", "translate the sign",
                    "what phone was used", "is the food tasty", "which country is it", "tell me a story",
                    "what are they wearing", "make it black and white", "which bird is this",
                    "what is the phone number",
                    "who won the game", "is this safe to eat", "what kind of bread is it", "how fast is the train",
                    "what is the price tag", "which team is playing", "read the number plate", "is it a real photo"]


@dataclass(frozen=True)
class Shape:
    """One shape: what it is called, and where it is drawn, in units of the 112-pixel picture."""

    colour: str
    form: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.colour, self.form, self.place

    @property
    def name(self) -> str:
        return f"{self.colour} {self.form}"


def is_held_out(colour: str, form: str, place: str) -> bool:
    """24 of the 189 triples. The three factors make each pair of attributes occur in training."""
    key = 3 * list(COLOURS).index(colour) + 5 * FORMS.index(form) + PLACES.index(place)
    return key % 8 == 0


HELD_OUT = [(c, f, p) for c in COLOURS for f in FORMS for p in PLACES if is_held_out(c, f, p)]
SEEN = [(c, f, p) for c in COLOURS for f in FORMS for p in PLACES if not is_held_out(c, f, p)]


def place_shape(rng: random.Random, triple: tuple[str, str, str]) -> Shape:
    """A shape of the triple somewhere in its ninth of the picture."""
    column, row = PLACES.index(triple[2]) % 3, PLACES.index(triple[2]) // 3
    x = SIZE / 6 + column * SIZE / 3 + rng.uniform(-9, 9)
    y = SIZE / 6 + row * SIZE / 3 + rng.uniform(-9, 9)
    radius = min(rng.uniform(8, 17), x - 1, y - 1, SIZE - 1 - x, SIZE - 1 - y)
    return Shape(*triple, x, y, radius)


def scene(rng: random.Random, triples: list[tuple[str, str, str]] | None = None,
          count: int | None = None) -> list[Shape]:
    """Shapes that differ in place and do not overlap, in reading order. The triples default to the seen ones."""
    count = rng.choices([0, 1, 2, 3, 4], [3, 36, 36, 16, 9])[0] if count is None else count
    while True:
        shapes = [place_shape(rng, rng.choice(triples or SEEN)) for _ in range(count)]
        pairs = [(a, b) for i, a in enumerate(shapes) for b in shapes[:i]]
        if any(a.place == b.place or a.name == b.name for a, b in pairs):
            continue
        if any(math.hypot(a.x - b.x, a.y - b.y) < a.radius + b.radius + 2 for a, b in pairs):
            continue
        return sorted(shapes, key=lambda s: PLACES.index(s.place))


def background(rng: random.Random, used: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """White, light, middle or dark, but never close to the colour of a shape."""
    for _ in range(40):
        base = rng.choice([255, 250, rng.randint(215, 255), rng.randint(215, 255), rng.randint(120, 255),
                           rng.randint(20, 120)])
        tint = 0 if base == 255 else 14
        colour = tuple(max(0, min(255, base + rng.randint(-tint, tint))) for _ in range(3))
        if all(math.dist(colour, other) > 110 for other in used):
            return colour  # type: ignore[return-value]
    return (255, 255, 255)


def corners(form: str, x: float, y: float, r: float, turn: float, stretch: float) -> list[tuple[float, float]]:
    """The corner points of a square or a triangle, turned a little."""
    if form == "square":
        points = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    else:
        points = [(0.0, -1.0), (-1.0, 0.85), (1.0, 0.85)]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x + r * stretch * (a * cos - b * sin), y + r / stretch * (a * sin + b * cos)) for a, b in points]


def draw(rng: random.Random, shapes: list[Shape], size: int | None = None) -> Image.Image:
    """The scene as a square picture of any size."""
    size = size or rng.choice([112, 112, 224, 336, rng.randint(90, 420)])
    zoom = size / SIZE
    fills = []
    for shape in shapes:
        anchor = rng.choice(COLOURS[shape.colour])
        fills.append(tuple(max(0, min(255, v + rng.randint(-15, 15))) for v in anchor))
    image = Image.new("RGB", (size, size), background(rng, fills))  # type: ignore[arg-type]
    pen = ImageDraw.Draw(image)
    for shape, fill in zip(shapes, fills, strict=True):
        x, y, r, stretch = shape.x * zoom, shape.y * zoom, shape.radius * zoom, rng.uniform(0.92, 1.09)
        turn = rng.choice([0.0, rng.uniform(-0.21, 0.21)])
        if shape.form == "circle":
            pen.ellipse([x - r * stretch, y - r / stretch, x + r * stretch, y + r / stretch], fill=fill)
        else:
            pen.polygon(corners(shape.form, x, y, r, turn, stretch), fill=fill)
    return roughen(rng, image)


def roughen(rng: random.Random, image: Image.Image) -> Image.Image:
    """Sometimes the traces of a JPEG file."""
    if rng.random() > 0.2:
        return image
    store = io.BytesIO()
    image.save(store, "JPEG", quality=rng.randint(45, 90))
    return Image.open(store).convert("RGB")


def texture(rng: random.Random) -> Image.Image:
    """Soft noise that stands for a photograph: there is no simple shape in it."""
    cells = rng.choice([3, 5, 8, 16])
    noise = bytes(rng.randrange(256) for _ in range(cells * cells * 3))
    return Image.frombytes("RGB", (cells, cells), noise).resize((224, 224), Image.Resampling.BICUBIC)


def article(colour: str) -> str:
    return "an" if colour == "orange" else "a"


def where(place: str) -> str:
    """The place as a phrase."""
    if place == "centre":
        return "in the centre"
    if place in ("left", "right"):
        return f"on the {place}"
    return f"at the {place}" if place in ("top", "bottom") else f"in the {place} corner"


def describe(shapes: list[Shape]) -> str:
    """The list of all the shapes in reading order."""
    if not shapes:
        return NOTHING
    parts = [f"{article(s.colour)} {s.name} {where(s.place)}" for s in shapes]
    return "I see " + (", ".join(parts[:-1]) + " and " if len(parts) > 1 else "") + parts[-1] + "."


def counted(shapes: list[Shape]) -> str:
    return "There is one shape." if len(shapes) == 1 else f"There are {NUMBERS[len(shapes)]} shapes."


def about_colour(rng: random.Random, shapes: list[Shape]) -> Sample | None:
    form = rng.choice(shapes).form if rng.random() < 0.85 else rng.choice(FORMS)
    found = [s for s in shapes if s.form == form]
    if len(found) > 1:
        return None
    word = rng.choice(["colour", "color"])
    question = rng.choice([f"What {word} is the {form}?", f"Which {word} does the {form} have?",
                           f"Which {word} is the {form}?", f"Tell me the {word} of the {form}."])
    return Sample(question, f"The {form} is {found[0].colour}." if found else f"There is no {form} in the picture.",
                  kind="colour")


def about_place(rng: random.Random, shapes: list[Shape]) -> Sample | None:
    shape = rng.choice(shapes)
    alone = sum(s.form == shape.form for s in shapes) == 1
    name = shape.form if alone and rng.random() < 0.4 else shape.name
    question = rng.choice([f"Where is the {name}?", f"What is the position of the {name}?",
                           f"In which place is the {name}?", f"where do you see the {name}?"])
    return Sample(question, f"The {name} is {where(shape.place)}.", kind="place")


def about_form(rng: random.Random, shapes: list[Shape]) -> Sample | None:
    colour = rng.choice(shapes).colour if rng.random() < 0.85 else rng.choice(list(COLOURS))
    found = [s for s in shapes if s.colour == colour]
    if len(found) > 1:
        return None
    question = rng.choice([f"What shape is {colour}?", f"Which shape is {colour}?", f"What is the {colour} shape?",
                           f"What is {colour}?"])
    return Sample(question, f"The {colour} shape is a {found[0].form}." if found else f"No shape is {colour}.",
                  kind="shape")


def about_corner(rng: random.Random, shapes: list[Shape]) -> Sample:
    place = rng.choice(shapes).place if shapes and rng.random() < 0.75 else rng.choice(PLACES)
    found = [s for s in shapes if s.place == place]
    question = rng.choice([f"What is {where(place)}?", f"What do you see {where(place)}?",
                           f"Which shape is {where(place)}?"])
    answer = f"There is {article(found[0].colour)} {found[0].name} {where(place)}." if found else \
        f"There is nothing {where(place)}."
    return Sample(question, answer, kind="what is there")


def about_presence(rng: random.Random, shapes: list[Shape]) -> Sample:
    shape = rng.choice(shapes) if shapes and rng.random() < 0.5 else None
    colour, form = (shape.colour, shape.form) if shape else (rng.choice(list(COLOURS)), rng.choice(FORMS))
    named = f"{article(colour)} {colour} {form}"
    there = any(s.name == f"{colour} {form}" for s in shapes)
    question = rng.choice([f"Is there {named}?", f"Do you see {named}?", f"Is {named} in the picture?"])
    answer = f"Yes, there is {named}." if there else f"No, there is no {colour} {form}."
    return Sample(question, answer, kind="is there")


# How often each kind is asked in the first and in the second stage of the training.
KINDS = ["describe", "colour", "place", "form", "corner", "presence", "count", "talk", "foreign"]
FIRST_STAGE = [30, 14, 14, 12, 8, 6, 8, 2, 6]
SECOND_STAGE = [32, 14, 9, 16, 8, 11, 3, 1, 6]


def ask(rng: random.Random, shapes: list[Shape], weights: list[int] = FIRST_STAGE) -> Sample:
    """One question about the scene with the exact answer."""
    kind = rng.choices(KINDS, weights)[0]
    if kind == "talk":
        return small_talk(rng, HELLO, WELCOME)
    if kind == "foreign" and weights is SECOND_STAGE and rng.random() < 0.5:
        return Sample(vary_writing(rng, foreign_question(rng)), REFUSAL, kind="refusal")
    if kind == "foreign":
        return Sample(vary_writing(rng, rng.choice(FOREIGN)), REFUSAL, kind="refusal")
    found: Sample | None = None
    if kind == "corner":
        found = about_corner(rng, shapes)
    elif kind == "presence":
        found = about_presence(rng, shapes)
    elif kind == "count":
        found = Sample(rng.choice(["How many shapes are there?", "How many objects do you see?", "Count the shapes.",
                                   "How many shapes are in the picture?"]), counted(shapes), kind="count")
    elif shapes and kind != "describe":
        found = {"colour": about_colour, "place": about_place, "form": about_form}[kind](rng, shapes)
    found = found or Sample(rng.choice(DESCRIBE), describe(shapes), kind="describe")
    if rng.random() < 0.25:
        return Sample(vary_writing(rng, found.question), found.answer, kind=found.kind)
    return found


def training_scene(rng: random.Random) -> tuple[list[Shape], Image.Image]:
    """The next training picture: only seen triples, now and then no shape at all."""
    shapes = scene(rng)
    if not shapes and rng.random() < 0.6:
        return shapes, texture(rng)
    return shapes, draw(rng, shapes)


def test_set(which: str, count: int, seed: int = 90210) -> list[tuple[Image.Image, Sample, int]]:
    """Pictures, questions and the number of shapes; `which` is "seen", "held out" or "many" (3 or 4 shapes)."""
    rng = random.Random(f"{which} {seed}")
    out: list[tuple[Image.Image, Sample, int]] = []
    while len(out) < count:
        number = rng.choice([3, 4]) if which == "many" else rng.choice([1, 2])
        shapes = scene(rng, HELD_OUT if which == "held out" else SEEN, number)
        sample = ask(rng, shapes)
        if sample.kind not in ("refusal", "hello", "thanks"):
            out.append((draw(rng, shapes), sample, len(shapes)))
    return out


def foreign_set() -> list[tuple[Image.Image, Sample]]:
    """Questions the model cannot know, in words that the training does not contain, each with a fresh picture."""
    rng = random.Random(90211)
    samples = [Sample(q[:1].upper() + q[1:] + "?", REFUSAL, kind="refusal") for q in FOREIGN_HELD_OUT]
    return [(draw(rng, scene(rng, SEEN, rng.choice([1, 2]))), sample) for sample in samples]


def pixels(image: Image.Image) -> np.ndarray:
    """The picture as the 64 patches of the Qwen2.5-VL tower, in its order (2 x 2 patches make one token)."""
    small = image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    grid = SIZE // 14
    values = (np.asarray(small, dtype=np.float32) / 255 - 0.5) / 0.5
    values = values.transpose(2, 0, 1)[None].repeat(2, 0)
    values = values.reshape(1, 2, 3, grid // 2, 2, 14, grid // 2, 2, 14).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    patches: np.ndarray = np.ascontiguousarray(values.reshape(grid * grid, 3 * 2 * 14 * 14))
    return patches


def token_labels(shapes: list[Shape]) -> np.ndarray:
    """Colour, form and place (0 = none) of what each of the 16 image tokens shows; a target for training only."""
    labels: np.ndarray = np.zeros((TOKENS, 3), dtype=np.int64)
    for token in range(TOKENS):
        x, y = 14 + 28 * (token % 4), 14 + 28 * (token // 4)
        near = [s for s in shapes if max(abs(s.x - x), abs(s.y - y)) < 12 + 0.7 * s.radius]
        if near:
            shape = min(near, key=lambda s: math.hypot(s.x - x, s.y - y))
            labels[token] = (1 + list(COLOURS).index(shape.colour), 1 + FORMS.index(shape.form),
                             1 + PLACES.index(shape.place))
    return labels
