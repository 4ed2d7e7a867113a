"""Presets: what the strict reader refuses and says, replacement by a person's own files, and the round trip."""

from __future__ import annotations

import os
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.errors import PresetError, PresetInvalid, PresetNotFound
from modules.messages import Sampling
from modules.presets import MAX_FILE_BYTES, Options, Preset, Presets, Shape, Variant, dumps

SHIPPED = Path(__file__).parent.parent / "presets"

GOOD = """
title = "Mine"
task = "coding"
[sampling]
temperature = 0.5
[[variants]]
title = "Demo"
engine = "llamacpp"
bundled = "coding"
"""
EXL = """
title = "Mine"
task = "coding"
[[variants]]
title = "Big"
engine = "exllamav2"
repo = "owner/name"
revision = "4_25"
"""


@pytest.fixture
def folders(tmp_path):
    builtin, own = tmp_path / "builtin", tmp_path / "own"
    builtin.mkdir()
    return builtin, own


@pytest.fixture
def presets(folders):
    return Presets(folders)


def load(text, name="mine", engines=()):
    return Presets([Path("builtin")], engines).loads(text, Path("own") / f"{name}.toml")


def complaint(text, name="mine"):
    with pytest.raises(PresetInvalid) as caught:
        load(text, name)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{name}.toml" in message
    return message


def test_values_and_defaults():
    preset = load(GOOD)
    variant = preset.variants[0]
    assert (preset.name, preset.title, preset.task, preset.builtin) == ("mine", "Mine", "coding", False)
    assert preset.sampling == Sampling(temperature=0.5)
    assert (variant.id, variant.bundled, variant.cache_mode, variant.parallel) == ("demo", "coding", "FP16", 1)
    assert variant.system is None and variant.sampling is None and variant.thinking is None


def test_a_preset_of_the_first_folder_is_built_in():
    assert Presets([Path("builtin")]).loads(GOOD, Path("builtin/mine.toml")).builtin


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        (GOOD.replace("title = ", "titel = ", 1), "titel", "title"),
        (GOOD.replace("temperature", "temprature"), "sampling.temprature", "temperature"),
        (GOOD.replace("bundled", "bundle"), "variants[1].bundle", "bundled"),
        (GOOD + "shape = { layer = 3 }", "variants[1].shape.layer", "layers"),
        (GOOD + "sampling = { topp = 3 }", "variants[1].sampling.topp", "top_p"),
        (GOOD + '"a\\nb" = 1', 'variants[1]."a\\nb"', "tier"),
    ],
)
def test_unknown_key_names_file_key_and_nearest(text, key, nearest):
    message = complaint(text)
    assert message.startswith(f"mine.toml: {key} is not a known key")
    if key[-1] != '"':
        assert message.endswith(f"the nearest known one is {nearest}.")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("title = 3", "title must be text in quotes, but is 3."),
        ('title = " "', "title must not be empty."),
        (f'title = "{"x" * 81}"', "title may have 80 characters, but has 81."),
        ('title = "a\\u0000b"', "title holds a control character."),
        ('title = "a\\nb"', "title holds a control character."),
        ('task = "codeing"', "task must be one of assistant, vision, coding, reasoning, but is \"codeing\"; "
         "did you mean coding?"),
        ("task = []", "task must be one of assistant, vision, coding, reasoning, but is a list."),
        ("order = true", "order must be a whole number from -1000000 to 1000000, but is true."),
        ("order = 1.5", "order must be a whole number from -1000000 to 1000000, but is 1.5."),
        ("thinking = 1", "thinking must be true or false, but is 1."),
        ('examples = "one"', 'examples must be a list of 0 to 8 items, but is "one".'),
        ('examples = ["one", 2]', "examples[2] must be text in quotes, but is 2."),
        ("examples = [1979-05-27]", "examples[1] must be text in quotes, but is 1979-05-27."),
        ("variants = []", "variants must be a list of 1 to 200 items, but has 0."),
        ("variants = [1]", "variants[1] must be a table, but is 1."),
        ("sampling = 1", "sampling must be a table, but is 1."),
        ("sampling = { temperature = 5.1 }", "sampling.temperature must be a number from 0 to 5, but is 5.1."),
        ("sampling = { temperature = nan }", "sampling.temperature must be a number from 0 to 5, but is nan."),
        ("sampling = { temperature = true }", "sampling.temperature must be a number from 0 to 5, but is true."),
        ("sampling = { temperature = {} }", "sampling.temperature must be a number from 0 to 5, but is a table."),
        ("sampling = { top_p = 1.01 }", "sampling.top_p must be a number from 0 to 1, but is 1.01."),
        ("sampling = { max_tokens = 0 }", "sampling.max_tokens must be a whole number from 1 to 1048576, but is 0."),
        ('sampling = { stop = [""] }', "sampling.stop[1] must not be empty."),
    ],
)  # fmt: skip
def test_wrong_value_of_a_preset(line, said):
    key = line.split(" ")[0]
    lines = {"title": 'title = "Mine"', "task": 'task = "coding"'}
    lines["variants"] = 'variants = [{ title = "Demo", engine = "llamacpp", bundled = "coding" }]'
    lines[key] = line
    assert complaint("\n".join(lines.values())) == f"mine.toml: {said}"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("context = 255", "context"),
        ("context = 1048577", "context"),
        ('cache_mode = "Q5"', "cache_mode"),
        ("parallel = 0", "parallel"),
        ("parallel = 65", "parallel"),
        ("bpw = inf", "bpw"),
        ("size_bytes = -1", "size_bytes"),
        ("context = 4096\nmax_position_embeddings = 2048", "context"),
        ("shape = { layers = 3 }", "shape.hidden"),
        ('tier = "NVIDIA"', "tier"),
        ('id = "../x"', "id"),
        ('revision = "main"', "revision"),
        ('file = "a.gguf"', "file"),
        ('projector = "a.gguf"', "projector"),
        ("system = 1", "system"),
        ("threads = -1", "threads"),
    ],
)
def test_wrong_value_of_a_variant(line, key):
    assert complaint(GOOD + line).startswith(f"mine.toml: variants[1].{key} ")


@pytest.mark.parametrize("key", ["title", "task", "variants"])
def test_missing_key_of_a_preset(key):
    text = GOOD.split("[[variants]]")[0] if key == "variants" else GOOD.replace(f"{key} =", f"#{key} =", 1)
    assert complaint(text) == f"mine.toml: {key} is missing."


def test_missing_engine():
    assert complaint(GOOD.replace("engine", "#")) == "mine.toml: variants[1].engine is missing."


def test_exactly_one_source():
    none = complaint(GOOD.replace('bundled = "coding"', ""))
    two = complaint(GOOD + 'path = "~/model.gguf"')
    assert none == "mine.toml: variants[1] must have exactly one of repo, bundled and path, but has none."
    assert two == "mine.toml: variants[1] must have exactly one of repo, bundled and path, but has bundled and path."


def test_exllama_needs_a_revision_and_no_gguf():
    assert load(EXL).variants[0].revision == "4_25"
    assert "variants[1].revision is missing" in complaint(EXL.replace("revision", "#"))
    assert "variants[1].file " in complaint(EXL + 'file = "a.gguf"')
    assert "variants[1].bundled needs the engine llamacpp" in complaint(GOOD.replace("llamacpp", "exllamav3"))


def test_options_belong_to_the_exllama_engines():
    said = 'options = { force_thought = true, draft = "ngram", chunk_size = 512, loras = ["/a:0.5"] }\n'
    options = load(EXL + said).variants[0].options
    assert options == Options(force_thought=True, draft="ngram", chunk_size=512, loras=("/a:0.5",))
    assert load(dumps(load(EXL + said))).variants[0].options == options
    assert load(EXL).variants[0].options is None
    assert "mean nothing to llamacpp" in complaint(GOOD + said)
    assert "not a multiple of 256" in complaint(EXL + "options = { chunk_size = 300 }")
    for wrong in ('draft = "magic"', "draft_tokens = 9", 'gpu_split = "half"', 'draft_model = "../x"', "max_pixel = 1"):
        assert "options" in complaint(EXL + f"options = {{ {wrong} }}")


def test_llamacpp_repo_needs_a_file():
    text = EXL.replace("exllamav2", "llamacpp")
    assert "variants[1].file is missing" in complaint(text)
    assert load(text + 'file = "a.gguf"').variants[0].file == "a.gguf"


@pytest.mark.parametrize(
    "name",
    ["../a.gguf", "a/b.gguf", "a\\b.gguf", "/a.gguf", "C:a.gguf", "..gguf", "a..gguf", "-a.gguf", ".a.gguf", "a.bin",
     "", "a\u0000.gguf", "x" * 300 + ".gguf"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["file", "projector"])
def test_file_names_stay_in_their_folder(key, name):
    text = EXL.replace("exllamav2", "llamacpp")
    other = 'file = "good.gguf"\n' if key == "projector" else ""
    escaped = name.replace("\\", "\\\\").replace("\0", "\\u0000")
    assert f"variants[1].{key} must be a plain file name" in complaint(f'{text}{other}{key} = "{escaped}"')


@pytest.mark.parametrize(
    ("key", "value"),
    [("repo", "name"), ("repo", "a/b/c"), ("repo", "../x"), ("repo", "-o/n"), ("repo", "a/.."), ("revision", "../x"),
     ("revision", "-rf"), ("revision", "refs/pr/1"), ("revision", "a b"), ("revision", "$(x)")],
)  # fmt: skip
def test_repo_and_revision_are_plain_words(key, value):
    text = EXL.replace('repo = "owner/name"' if key == "repo" else 'revision = "4_25"', f'{key} = "{value}"')
    assert f"variants[1].{key} must be" in complaint(text)


@pytest.mark.parametrize("path", ["model.gguf", "~other/x.gguf", "//host/share/x", "\\\\\\\\host\\\\x", "/a/../b", "~"])
def test_own_path_is_whole_and_local(path):
    text = GOOD.replace('bundled = "coding"', f'path = "{path}"')
    assert "variants[1].path must be a whole path on this machine" in complaint(text)


@pytest.mark.parametrize("path", ["/data/model.gguf", "~/model.gguf", "C:\\\\models\\\\m.gguf"])
def test_own_path_of_each_system(path):
    assert load(GOOD.replace('bundled = "coding"', f'path = "{path}"')).variants[0].path == path.replace("\\\\", "\\")


@pytest.mark.parametrize("name", ["My-preset", "a b", "-a", "_a", "a.b", "nul", "com1", "x" * 65, "ä"])
def test_names(name):
    assert "has a wrong name" in complaint(GOOD, name)


def test_other_ending():
    with pytest.raises(PresetInvalid, match=r"mine\.txt must end in \.toml"):
        Presets([]).loads(GOOD, Path("mine.txt"))


def test_engines_that_are_handed_in():
    text = GOOD.replace("llamacpp", "fake")
    assert load(text, engines=["fake"]).variants[0].engine == "fake"
    assert "variants[1].engine must be one of exllamav2, exllamav3, llamacpp, but is" in complaint(text)
    assert load(EXL.replace("exllamav2", "fake").replace("revision", "#"), engines=["fake"]).variants[0].file == ""


@pytest.mark.parametrize(
    "text",
    ["title = ", "x = " + "[" * 5000, "x = " + "{a=" * 5000, "x = " + "9" * 5000, "[" * 5000, "a = 1\na = 2", "\x00"],
)
def test_not_toml(text):
    assert complaint(text).startswith("mine.toml is not TOML: ")


@pytest.mark.parametrize("text", ["a." * 60_000 + "a = 1", "x = {" + '"a" . ' * 30_000 + "a = 1}", "[" + "a." * 99_999])
@pytest.mark.timeout(5)
def test_long_dotted_keys_are_refused_at_once(text):
    # The parser itself would take minutes: its time grows with the square of the parts.
    assert "dotted key of more than 16 parts" in complaint(text)


@pytest.mark.timeout(5)
def test_long_words_and_dots_are_no_dotted_keys():
    load(GOOD.replace('"Mine"', '"Mine"\nsystem = "' + "x" * 50_000 + "." * 40_000 + '"'))


def test_too_large():
    assert complaint(GOOD + "#" * MAX_FILE_BYTES) == "mine.toml is larger than 256 KB."


def test_ids_are_unique_and_stable():
    again = '[[variants]]\ntitle = "Demo"\nengine = "llamacpp"\nbundled = "coding"\n'
    other = again.replace("Demo", "Größe 8.0 bpw!") + 'tier = "nvidia-24"\n'
    signs = again.replace("Demo", "…")
    preset = load(GOOD + again + again + other + signs)
    ids = [variant.id for variant in preset.variants]
    assert ids == ["demo", "demo-2", "demo-3", "nvidia-24-gr-e-8-0-bpw", "variant"]


def test_an_id_cannot_be_taken_twice():
    twice = '[[variants]]\nid = "demo"\ntitle = "Other"\nengine = "llamacpp"\nbundled = "coding"\n'
    assert complaint(GOOD + twice) == 'mine.toml: variants[2].id is "demo", which another variant has already.'


# Folders ---------------------------------------------------------------------------


def put(folder, name, text=GOOD):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_listed_by_order_then_name(folders, presets):
    put(folders[0], "b")
    put(folders[0], "a")
    put(folders[1], "z", "order = 1\n" + GOOD)
    put(folders[1], ".hidden")
    (folders[1] / "notes.txt").write_text("not a preset")
    assert [preset.name for preset in presets.list()] == ["z", "a", "b"]
    assert [preset.builtin for preset in presets.list()] == [False, True, True]


def test_no_folders_at_all(tmp_path):
    presets = Presets([tmp_path / "none", tmp_path / "neither"])
    assert presets.list() == [] and presets.broken() == []
    with pytest.raises(PresetNotFound, match="there are no presets at all"):
        presets.get("coding")


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert Presets([tmp_path / "file"]).list() == []


def test_new_changed_and_deleted_files_are_seen(folders, presets):
    path = put(folders[0], "a")
    assert presets.get("a").title == "Mine"
    assert presets.get("a") is presets.get("a")
    put(folders[0], "a", GOOD.replace("Mine", "Other"))
    put(folders[0], "new")
    assert presets.get("a").title == "Other"
    assert [preset.name for preset in presets.list()] == ["a", "new"]
    path.unlink()
    assert [preset.name for preset in presets.list()] == ["new"]


def test_a_change_that_keeps_the_size_is_seen_by_its_time(folders, presets):
    path = put(folders[0], "a")
    assert presets.get("a").title == "Mine"
    put(folders[0], "a", GOOD.replace("Mine", "Ours"))
    os.utime(path, ns=(1, 1))
    assert presets.get("a").title == "Ours"


def test_own_file_replaces_the_built_in_one(folders, presets):
    put(folders[0], "coding")
    put(folders[1], "coding", GOOD.replace("Mine", "Own"))
    assert [(preset.title, preset.builtin) for preset in presets.list()] == [("Own", False)]
    (folders[1] / "coding.toml").unlink()
    assert presets.get("coding").builtin


def test_a_broken_file_is_reported_and_the_rest_works(folders, presets):
    put(folders[0], "good")
    path = put(folders[0], "bad", "title = 1")
    assert [preset.name for preset in presets.list()] == ["good"]
    (broken,) = presets.broken()
    assert (broken.name, broken.path) == ("bad", path)
    assert "bad.toml: title must be text" in str(broken.error)
    with pytest.raises(PresetInvalid, match=r"bad\.toml: title must be text"):
        presets.get("bad")


def test_a_broken_own_file_does_not_fall_back_to_the_built_in_one(folders, presets):
    put(folders[0], "coding")
    put(folders[1], "coding", "oops")
    assert presets.list() == []
    with pytest.raises(PresetInvalid, match="is not TOML"):
        presets.get("coding")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'title = "\xff"', "bad.toml is not UTF-8 text: byte 10 is wrong."),
        (b"#" * (MAX_FILE_BYTES + 1), "bad.toml is larger than 256 KB."),
    ],
)
def test_unreadable_content(folders, presets, raw, said):
    put(folders[0], "bad", raw)
    assert [str(broken.error) for broken in presets.broken()] == [said]


def test_things_that_are_not_files(folders, presets):
    (folders[0] / "folder.toml").mkdir()
    (folders[0] / "dangling.toml").symlink_to(folders[0] / "nowhere")
    os.mkfifo(folders[0] / "pipe.toml")
    errors = {broken.name: str(broken.error) for broken in presets.broken()}
    assert errors == {name: f"{name}.toml is not a regular file." for name in ("folder", "dangling", "pipe")}


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read(folders, presets):
    put(folders[0], "secret").chmod(0)
    assert "secret.toml cannot be read" in str(presets.broken()[0].error)


def test_not_found_names_the_nearest(folders, presets):
    put(folders[0], "coding")
    put(folders[0], "vision")
    with pytest.raises(PresetNotFound, match='There is no preset "codnig"; the nearest name is "coding"'):
        presets.get("codnig")
    for name in ("../coding", "", "x" * 10_000, "a\nb"):
        with pytest.raises(PresetNotFound) as caught:
            presets.get(name)
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_readers_and_a_writer_at_once(folders, presets):
    put(folders[0], "coding")
    preset = presets.get("coding")
    failures = []

    def read():
        try:
            for _ in range(100):
                assert presets.get("coding").title in ("Mine", *(f"Title {n}" for n in range(100)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(100):
        presets.save(replace(preset, title=f"Title {number}"))
    for thread in threads:
        thread.join()
    assert failures == []
    assert presets.get("coding").title == "Title 99"


# Saving ------------------------------------------------------------------------------


def test_saved_into_the_own_folder_only(folders, presets):
    original = put(folders[0], "coding")
    before = original.read_bytes()
    changed = replace(presets.get("coding"), title="Changed", sampling=Sampling(temperature=0.25))
    saved = presets.save(changed)
    assert saved == replace(changed, path=folders[1] / "coding.toml", builtin=False)
    assert presets.get("coding") == saved
    assert original.read_bytes() == before
    assert [path.name for path in folders[1].iterdir()] == ["coding.toml"]


@pytest.mark.parametrize("name", ["../escape", "/escape", "a/b", "..", "", "a\0b", "Coding", "con", "a\\b"])
def test_save_never_leaves_the_folder(folders, presets, tmp_path, name):
    folders[1].mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PresetInvalid):
        presets.save(replace(load(GOOD), name=name))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_invalid_preset_is_not_saved(folders, presets):
    put(folders[0], "coding")
    with pytest.raises(PresetInvalid, match=r"sampling\.temperature"):
        presets.save(replace(presets.get("coding"), sampling=Sampling(temperature=9)))
    with pytest.raises(PresetInvalid, match="control character"):
        presets.save(replace(presets.get("coding"), system="\ud800"))
    assert not folders[1].exists()


def test_a_broken_file_is_never_overwritten(folders, presets):
    put(folders[0], "coding")
    preset = presets.get("coding")
    path = put(folders[1], "coding", "half written by hand")
    with pytest.raises(PresetInvalid, match="Not saved over a broken file"):
        presets.save(preset)
    assert path.read_text() == "half written by hand"


def test_one_folder_is_never_written(tmp_path):
    with pytest.raises(PresetError, match="no folder for presets of your own"):
        Presets([tmp_path]).save(load(GOOD))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses(folders, presets):
    folders[1].write_text("a file where the folder should be")
    with pytest.raises(PresetError, match=r"mine\.toml could not be written"):
        presets.save(load(GOOD))


def test_a_full_disk_keeps_the_old_file_and_leaves_no_half_one(folders, presets):
    path = put(folders[1], "mine")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(PresetError, match=r"mine\.toml could not be written: File too large"):
            presets.save(replace(load(GOOD), title="Changed"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in folders[1].iterdir()] == ["mine.toml"]
    assert path.read_bytes() == before


def test_a_folder_under_the_name_is_left_alone(folders, presets):
    folders[1].mkdir()
    (folders[1] / "mine.toml").mkdir()
    with pytest.raises(PresetInvalid, match="is not a regular file"):
        presets.save(load(GOOD))
    assert [path.name for path in folders[1].iterdir()] == ["mine.toml"]


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n\t\r"\\'), max_size=60)
LINES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(str.strip)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0, 5),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 1000),
    repetition_penalty=st.floats(0.1, 5),
    presence_penalty=st.floats(-2, 2),
    seed=st.none() | st.integers(0, 2**32 - 1),
    max_tokens=st.integers(1, 2**20),
    stop=st.lists(TEXTS.filter(bool), max_size=3).map(tuple),
)
SHAPES = st.builds(Shape, *([st.integers(1, 1024)] * 7), kv_layers=st.integers(0, 64))
VARIANTS = st.builds(
    Variant,
    id=st.just(""),
    title=LINES,
    engine=st.just("llamacpp"),
    tier=st.sampled_from(["", "demo", "nvidia-24"]),
    bundled=st.just("coding"),
    bpw=st.none() | st.floats(0.5, 32),
    context=st.integers(256, 2**20),
    shape=st.none() | SHAPES,
    system=st.none() | TEXTS,
    sampling=st.none() | SAMPLINGS,
    thinking=st.none() | st.booleans(),
    note=TEXTS,
)
PRESETS = st.builds(
    Preset,
    name=st.just("mine"),
    title=LINES,
    task=st.just("vision"),
    order=st.integers(-1000, 1000),
    about=TEXTS,
    system=TEXTS,
    thinking=st.none() | st.booleans(),
    examples=st.lists(LINES, max_size=4).map(tuple),
    sampling=SAMPLINGS,
    variants=st.lists(VARIANTS, min_size=1, max_size=4).map(tuple),
    path=st.just(Path("own/mine.toml")),
    builtin=st.just(False),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PRESETS)
def test_round_trip(preset):
    # Ids come with reading, so the first reading gives them and the second must keep them.
    first = load(dumps(preset))
    assert replace(first, variants=tuple(replace(v, id="") for v in first.variants)) == preset
    assert load(Presets([]).dumps(first)) == first


def test_round_trip_keeps_a_chosen_id_and_a_system_prompt_of_none():
    text = GOOD + 'id = "pinned"\nsystem = ""\nsampling = {}\n'
    preset = load(text)
    assert (preset.variants[0].system, preset.variants[0].sampling) == ("", Sampling())
    assert load(dumps(preset)) == preset


# The shipped files ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    presets = Presets([SHIPPED])
    assert presets.broken() == []
    return {preset.name: preset for preset in presets.list()}


def test_four_shipped_presets_in_order(shipped):
    assert list(shipped) == ["assistant", "vision", "coding", "reasoning"]
    for name, preset in shipped.items():
        assert preset.task == name and preset.system and preset.about
        assert 2 <= len(preset.examples) <= 4
        assert load(dumps(preset), name) == replace(preset, path=Path(f"own/{name}.toml"), builtin=False)


@pytest.mark.parametrize(
    ("name", "repo", "revision", "cache_mode", "context"),
    [
        ("assistant", "TheMelonGod/phi-4-exl2", "8hb-6.5bpw", "Q8", 16384),
        ("vision", "turboderp/Qwen2.5-VL-7B-Instruct-exl2", "8.0bpw", "FP16", 32768),
        ("coding", "bartowski/Qwen2.5-Coder-32B-Instruct-exl2", "4_25", "Q6", 32768),
        ("reasoning", "bartowski/FuseO1-DeepSeekR1-QwQ-SkyT1-32B-Preview-exl2", "4_25", "Q6", 32768),
    ],
)
def test_the_given_picks_come_first(shipped, name, repo, revision, cache_mode, context):
    first = shipped[name].variants[0]
    assert (first.engine, first.tier) == ("exllamav2", "nvidia-24")
    assert (first.repo, first.revision, first.cache_mode, first.context) == (repo, revision, cache_mode, context)


def test_qwq_stands_behind_fuseo1(shipped):
    assert shipped["reasoning"].variants[1].repo == "bartowski/QwQ-32B-exl2"


def test_every_shipped_variant_is_complete(shipped):
    for preset in shipped.values():
        for variant in preset.variants:
            assert variant.tier and variant.licence and variant.size_bytes and variant.shape, variant.id
            assert variant.max_position_embeddings >= variant.context, variant.id
            # An answer as long as the whole context would leave no room for the question.
            assert 2 * (variant.sampling or preset.sampling).max_tokens <= variant.context, variant.id


def test_tiers_go_from_large_to_the_demo(shipped):
    tiers = ["nvidia-24", "nvidia-16", "nvidia-12", "nvidia-8"]
    order = [*tiers, *(f"{tier}-exl3" for tier in tiers), "cpu-better", "cpu-quick", "demo"]
    for preset in shipped.values():
        places = [order.index(variant.tier) for variant in preset.variants]
        assert places == sorted(places)
        assert set(order) == {variant.tier for variant in preset.variants}


def test_the_demo_is_last_and_small(shipped):
    for name, preset in shipped.items():
        demo = preset.variants[-1]
        assert (demo.bundled, demo.context, demo.parallel, demo.system, demo.max_turns) == (name, 2048, 4, "", 1)
        assert demo.sampling == Sampling(temperature=0.0, max_tokens=400)
        assert demo.max_images == (1 if name == "vision" else 0)
