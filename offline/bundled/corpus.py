"""Training, calibration and held-out text out of the standard library of the running Python.

Documents are source files (code with its docstrings) and the reference-manual topics that `pydoc` carries (prose).
Paragraphs seen before, and every paragraph of a held-out module, are dropped, so that licence headers and copied
helpers neither repeat nor leak into training. The order is a function of the file names alone.
"""

import ast
import hashlib
import itertools
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resq_vllm.errors import ResQError

HELDOUT_MODULES: tuple[str, ...] = (
    "bisect.py",
    "calendar.py",
    "colorsys.py",
    "csv.py",
    "fnmatch.py",
    "getopt.py",
    "graphlib.py",
    "heapq.py",
    "json/decoder.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "shlex.py",
    "string.py",
    "textwrap.py",
    "timeit.py",
)

# Tables, grammars' test data, and text that is no ordinary source; `site-packages` is not the standard library.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "__pycache__", "encodings", "lib2to3", "idlelib", "turtledemo", "ensurepip", "pydoc_data"}
    | {"cjkencodings", "decimaltestdata", "test_lib2to3", "data", "encoded_modules", "test_tools", "test_peg_generator"}
)
EXCLUDED_FILES = frozenset({"this.py", "keyword.py", "token.py", "_sysconfigdata.py", "pstats.py", "html/entities.py"})
EXCLUDED_PREFIXES = (
    "bad",
    "python-config",
    "_sysconfigdata",
    "test_unicode",
    "test_codec",
    "test_ucn",
    "test_multibytecodec",
)

MIN_PARAGRAPH = 120  # characters; shorter paragraphs may repeat, they are idioms rather than copies
TEST_BYTES = 4_000  # of one test module: enough to see its style, no single one dominates
CALIBRATION_BYTES = 1_150_000
CALIBRATION_PROSE = 0.3  # share of the calibration bytes taken from manual topics


@dataclass(frozen=True)
class Document:
    """One text. `name` is relative to the standard library; `kind` is "library", "test" or "prose"."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training documents in corpus order, and held-out documents in the order of HELDOUT_MODULES."""

    training: tuple[Document, ...]
    heldout: tuple[Document, ...]


def stdlib_folder() -> Path:
    """The standard library's folder of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def paragraphs(text: str) -> list[str]:
    """Paragraphs of `text`, which blank lines separate; indentation kept, trailing white space stripped."""
    blocks = itertools.groupby(text.split("\n"), key=lambda line: not line.strip())
    return ["\n".join(line.rstrip() for line in lines) for blank, lines in blocks if not blank]


def fingerprint(paragraph: str) -> str | None:
    """Identity of a paragraph up to white space, or None where it is too short to count as copied."""
    squeezed = " ".join(paragraph.split())
    return hashlib.sha256(squeezed.encode()).hexdigest() if len(squeezed) >= MIN_PARAGRAPH else None


def _without_seen(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs in `seen`, which gains those of `text`; at most two blank lines in a row."""
    kept: list[str] = []
    for blank, lines in itertools.groupby(text.split("\n"), key=lambda line: not line.strip()):
        block = [line.rstrip() for line in lines]
        mark = None if blank else fingerprint("\n".join(block))
        if mark is None or mark not in seen:
            kept.extend(block)
        if mark is not None:
            seen.add(mark)
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept).strip("\n")) + "\n"


def _read(path: Path) -> str | None:
    """The file as text, or None where it is no ordinary UTF-8 source."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None  # a source with another declared encoding: a test of the tokenizer, not text to learn
    plain = sum(character.isascii() for character in text)
    return text if len(text) >= 200 and plain >= 0.98 * len(text) else None


def _sources(root: Path) -> Iterator[tuple[str, str, Path]]:
    """(name, kind, path) of the source files that count, sorted by name."""
    heldout_tests = {f"test_{Path(name).stem}.py" for name in HELDOUT_MODULES} | {"test_decode.py"}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if EXCLUDED_FOLDERS.intersection(relative.parts) or name in EXCLUDED_FILES or name in HELDOUT_MODULES:
            continue
        if path.name.startswith(EXCLUDED_PREFIXES) or path.name in heldout_tests:
            continue
        is_test = bool({"test", "tests"}.intersection(relative.parts))
        yield name, "test" if is_test else "library", path


def _topics(root: Path) -> Iterator[Document]:
    """The reference manual's topics out of pydoc_data/topics.py, one document each."""
    path = root / "pydoc_data" / "topics.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name in sorted(topics):
                yield Document(f"pydoc_data/topics/{name}", "prose", topics[name])


def build_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library at `root` (default: the running interpreter's).

    Raises ResQError where a held-out module or the manual topics are missing.
    """
    root = stdlib_folder() if root is None else root
    for name in (*HELDOUT_MODULES, "pydoc_data/topics.py"):
        if not (root / name).is_file():
            raise ResQError(f"{root / name} is missing; build the corpus with a complete CPython 3.11 installation")
    heldout = tuple(Document(name, "library", (root / name).read_text(encoding="utf-8")) for name in HELDOUT_MODULES)
    seen = {mark for document in heldout for part in paragraphs(document.text) if (mark := fingerprint(part))}
    training: list[Document] = []
    library: list[tuple[str, str, Path]] = []
    tests: list[tuple[str, str, Path]] = []
    for name, kind, path in _sources(root):
        (tests if kind == "test" else library).append((name, kind, path))
    # The library comes first, so that a paragraph shared with a test is kept in the library.
    for name, kind, path in library + tests:
        text = _read(path)
        if text is None:
            continue
        if kind == "test" and len(text) > TEST_BYTES:
            text = text[: text.rindex("\n", 0, TEST_BYTES) + 1]
        text = _without_seen(text, seen)
        if len(text) >= 200:
            training.append(Document(name, kind, text))
    for topic in _topics(root):
        text = _without_seen(topic.text, seen)
        if len(text) >= 200:
            training.append(Document(topic.name, topic.kind, text))
    return Corpus(tuple(training), heldout)


def _spread(documents: list[Document], budget: int) -> list[Document]:
    """Documents in an order by the hash of their names, up to `budget` bytes."""
    chosen: list[Document] = []
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        size = len(document.text.encode())
        if size <= min(budget, 60_000):
            chosen.append(document)
            budget -= size
    return chosen


def calibration_text(corpus: Corpus) -> str:
    """About CALIBRATION_BYTES bytes of training documents: library code, and CALIBRATION_PROSE of manual prose."""
    prose_bytes = int(CALIBRATION_BYTES * CALIBRATION_PROSE)
    prose = _spread([document for document in corpus.training if document.kind == "prose"], prose_bytes)
    code_bytes = CALIBRATION_BYTES - prose_bytes
    code = _spread([document for document in corpus.training if document.kind == "library"], code_bytes)
    mixed = sorted(code + prose, key=lambda document: hashlib.sha256(b"mix" + document.name.encode()).digest())
    return "\n\n".join(document.text for document in mixed)


def heldout_text(corpus: Corpus) -> str:
    """The held-out modules, joined by blank lines."""
    return "\n\n".join(document.text for document in corpus.heldout)
