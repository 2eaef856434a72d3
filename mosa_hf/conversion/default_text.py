"""
The text that routers are fitted on where none is given: documentation, what programs write, and notes among sentences
that repeat. It needs no network and is the same on every machine, so that routers are, too. The documentation is this
project's own, as it was when it was taken. The rest is generated here: routers that saw prose alone lose more of what
is looked up in JSON, tables and logs, and such as never saw anything repeat keep the repetition and lose the one fact
in it (docs/choosing.md).
"""

import json
import random
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TypeVar

from .texts import Text

SEED = 20261129
PROSE = "default_prose.txt"  # beside this file; it stays as it is when the documentation changes
# Of each, about as many tokens as the prose has; notes take more than twice the characters a token.
CHARACTERS_OF_RECORDS, CHARACTERS_OF_NOTES = 56_000, 132_000
SYLLABLES = (
    *("ba", "cor", "del", "en", "fi", "gra", "hol", "is", "jun", "kel", "lo", "mar", "nis", "or", "pel", "qua", "ri"),
    *("sol", "ta", "ul", "ven", "wes", "yar", "zim"),
)
FIELDS = (
    "amount",
    "city",
    "email",
    "level",
    "owner",
    "phone",
    "port",
    "price",
    "rating",
    "serial",
    "status",
    "weight",
)
STATES = ("active", "archived", "delayed", "failed", "new", "paused", "ready", "shipped")
LEVELS = ("DEBUG", "ERROR", "INFO", "INFO", "INFO", "WARNING")
EVENTS = (
    "cache miss for {word}, fetched in {number} ms",
    "connection from {address} closed after {number} s",
    "job {serial} finished with status {number}",
    "retrying {word}-{number}: host {address} does not answer",
    "user {word} logged in from {address}",
    "wrote {number} rows to {word}_{serial}.db",
)
SUBJECTS = ("bridge", "carpet", "curtain", "ferry", "garden", "kettle", "lamp", "market", "orchard", "river")
VERBS = ("belongs to", "is older than", "leans on", "looks like", "passes", "stands behind", "waits by")
PLACES = ("a quiet street", "every window", "our neighbours", "the harbour", "the hill", "the old gate", "the station")
NOTES = (
    "The {field} of {name} is {value}.",
    "{name} has the {field} {value}.",
    "Note for later: {name}, {field} {value}.",
    "To reach {name}, use {field} {value}.",
)
Item = TypeVar("Item")


def default_text() -> Text:
    """Three documents: the prose, records, and notes."""
    name = "mosa_hf's default: documentation, generated JSON, CSV, logs, code and lists, and notes in filler"
    records = generated_text(CHARACTERS_OF_RECORDS)
    notes = generated_text(CHARACTERS_OF_NOTES, kinds=(notes_in_filler,))
    return Text(documents=(prose(), records, notes), name=name)


def prose() -> str:
    """Pages of this project's documentation, in Markdown."""
    return files(__package__).joinpath(PROSE).read_text(encoding="utf-8")


def generated_text(
    num_characters: int, seed: int = SEED, kinds: Sequence[Callable[["Source"], str]] | None = None
) -> str:
    """
    At least `num_characters`, of some kinds in turn (None: `KINDS`, what programs write); the same for a seed on every
    machine and version of Python.
    """
    source, parts, length = Source(seed), [], 0
    while length < num_characters:
        for make in KINDS if kinds is None else kinds:
            parts.append(make(source))
            length += len(parts[-1]) + 2
    return "\n\n".join(parts)


class Source:
    """Random words and numbers. Of `random.Random` only `random()` is promised to give the same in every version."""

    def __init__(self, seed: int):
        self._uniform = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        return low + int(self._uniform() * (high - low + 1))

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.number(0, len(items) - 1)]

    def several(self, items: Sequence[Item], number: int) -> list[Item]:
        """Different ones, in the order that they have."""
        chosen: set[int] = set()
        while len(chosen) < number:
            chosen.add(self.number(0, len(items) - 1))
        return [items[i] for i in sorted(chosen)]

    def word(self) -> str:
        return "".join(self.pick(SYLLABLES) for _ in range(self.number(2, 3)))

    def serial(self) -> str:
        return f"{self.pick('ABCDEFGHKLMNPRSTUVWXYZ')}{self.number(100, 99999)}"

    def address(self) -> str:
        return ".".join(str(self.number(1, 254)) for _ in range(4))

    def time(self) -> str:
        date = f"20{self.number(10, 26)}-{self.number(1, 12):02}-{self.number(1, 28):02}"
        return f"{date}T{self.number(0, 23):02}:{self.number(0, 59):02}:{self.number(0, 59):02}"

    def value(self, field: str) -> str | int | float:
        """What a record has in one of `FIELDS`."""
        values: dict[str, Callable[[], str | int | float]] = {
            "amount": lambda: self.number(1, 5000),
            "city": lambda: self.word().capitalize(),
            "email": lambda: f"{self.word()}@{self.word()}.example",
            "level": lambda: self.number(1, 99),
            "owner": lambda: f"{self.word().capitalize()} {self.word().capitalize()}",
            "phone": lambda: f"+{self.number(1, 99)} {self.number(100, 999)} {self.number(10000, 99999)}",
            "port": lambda: self.number(1024, 65535),
            "price": lambda: self.number(100, 99999) / 100,
            "rating": lambda: self.number(0, 50) / 10,
            "serial": self.serial,
            "status": lambda: self.pick(STATES),
            "weight": lambda: self.number(1, 9999) / 10,
        }
        return values[field]()


def json_records(source: Source) -> str:
    """A list of objects with the same fields, some of them nested."""
    fields = source.several(FIELDS, 4)
    records: list[dict[str, object]] = [
        {"id": source.serial(), **{field: source.value(field) for field in fields}}
        for _ in range(source.number(6, 12))
    ]
    for record in records[:: source.number(2, 4)]:
        record["tags"] = [source.word() for _ in range(source.number(1, 3))]
    return json.dumps({source.word(): records, "count": len(records)}, indent=source.pick((None, 2)))


def json_map(source: Source) -> str:
    """An object of names and values, and some of the names asked for again."""
    pairs = {f"{source.word()}_{source.word()}": source.value(source.pick(FIELDS)) for _ in range(16)}
    asked = source.several(list(pairs), 4)
    lines = [f'>>> settings["{name}"]\n{pairs[name]!r}' for name in asked]
    return "\n".join([f"settings = {json.dumps(pairs, indent=4)}", *lines])


def csv_table(source: Source) -> str:
    """Rows under a header."""
    fields = source.several(FIELDS, 5)
    rows = [[source.serial(), *(str(source.value(field)) for field in fields)] for _ in range(source.number(12, 20))]
    return "\n".join(",".join(row) for row in [["key", *fields], *rows])


def log_lines(source: Source) -> str:
    """What a server writes, in the order of time."""
    hosts = [f"{source.word()}-{source.number(1, 9)}" for _ in range(3)]
    lines = []
    for time in sorted(source.time() for _ in range(source.number(14, 22))):
        event = source.pick(EVENTS).format(
            word=source.word(), number=source.number(0, 9999), address=source.address(), serial=source.serial()
        )
        lines.append(f"{time} {source.pick(hosts)} {source.pick(LEVELS)} {event}")
    return "\n".join(lines)


def code(source: Source) -> str:
    """Constants, a class and functions of Python that use them."""
    constants = {source.word().upper(): source.value(source.pick(("amount", "port", "serial"))) for _ in range(6)}
    names, fields = list(constants), source.several(FIELDS, 3)
    kind = source.word().capitalize()
    lines = [f"{name} = {value!r}" for name, value in constants.items()]
    lines += ["", "", f"class {kind}:", f"    def __init__(self, {', '.join(fields)}):"]
    lines += [f"        self.{field} = {field}" for field in fields]
    for _ in range(3):
        verb, field, name = source.word(), source.pick(fields), source.pick(names)
        lines += ["", f"    def {verb}(self, limit={name}):", f"        if self.{field} == limit:"]
        lines += [f"            raise ValueError(f'{verb}: {{self.{field}}} is {{limit}}')"]
        lines += [f"        return {source.pick(names)}, self.{source.pick(fields)}"]
    values = ", ".join(repr(source.value(field)) for field in fields)
    return "\n".join([*lines, "", "", f"{kind.lower()} = {kind}({values})", f"print({names[0]}, {names[-1]})"])


def settings(source: Source) -> str:
    """Sections of keys and values, as in configuration files."""
    lines = []
    for _ in range(4):
        lines.append(f"[{source.word()}.{source.word()}]")
        lines += [f"{field} = {source.value(field)}" for field in source.several(FIELDS, 5)]
    return "\n".join(lines)


def key_values(source: Source) -> str:
    """A list of names and numbers, as in directories and inventories."""
    separator = source.pick((": ", " -> ", "\t", " = "))
    return "\n".join(f"- {source.word()} {source.word()}{separator}{source.serial()}" for _ in range(20))


def table(source: Source) -> str:
    """A table of Markdown."""
    fields = source.several(FIELDS, 3)
    rows = [[source.word(), *(str(source.value(field)) for field in fields)] for _ in range(source.number(8, 14))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [["name", *fields], ["---"] * (len(fields) + 1), *rows])


def notes_in_filler(source: Source) -> str:
    """A few plain sentences over and over, and notes among them that are written once."""
    filler = [
        f"The {source.pick(SUBJECTS)} {source.pick(VERBS)} {source.pick(PLACES)}." for _ in range(source.number(4, 8))
    ]
    sentences = [filler[i % len(filler)] for i in range(source.number(45, 60))]
    for _ in range(source.number(4, 7)):
        field, name = source.pick(FIELDS), source.pick((source.word(), f"{source.word()} {source.word()}"))
        note = source.pick(NOTES).format(field=field, name=name, value=source.value(field))
        sentences.insert(source.number(2, len(sentences)), note[0].upper() + note[1:])
    return " ".join(sentences)


KINDS: tuple[Callable[[Source], str], ...] = (
    json_records,
    log_lines,
    csv_table,
    code,
    json_map,
    key_values,
    settings,
    table,
)
