"""Small files of the shapes that people bring, and what `onecurve init` should take each for.

tests/launcher/starting/test_init_files.py runs `init` on all of them, and docs/build_init.py writes the table of docs/init.md.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.images import CLASSES, build_image, write_image

NUM_ROWS = 120
_ENGLISH = (
    "the river keeps a quiet house where old friends meet and nobody counts hours while rain falls over green hills behind "
    "every window someone reads letters from cities that grew beside cold water long before roads came"
)
_GERMAN = "der Fluss hält ein stilles Haus in dem alte Freunde sich treffen und niemand zählt die Stunden"
_RUSSIAN = "река хранит тихий дом где встречаются старые друзья и никто не считает часы пока идёт дождь"

Row = dict[str, Any]


def write_text(number: int, num_words: int = 12, words: str = _ENGLISH) -> str:
    """Words that differ from row to row, the same each time."""
    known = words.split()
    return " ".join(known[(number * 7 + place * (number % 5 + 1)) % len(known)] for place in range(num_words))


@dataclass(frozen=True)
class InitFile:
    """A file, and what it should be taken for.

    Attributes:
        name: of the file or folder.
        what: it is, for people.
        write: writes it under a path.
        task: expected; None where the file does not say.
        keys: expected, among others.
        could_be: of a file that does not say: the tasks that are listed.
        model: a kind of model whose files decide; None where the file does.
    """

    name: str
    what: str
    write: Callable[[Path], None]
    task: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    could_be: Sequence[str] = ()
    model: str | None = None


def rows_of(build: Callable[[int], Row]) -> Callable[[Path], None]:
    """Writes rows in the format of the file's name."""

    def write(path: Path) -> None:
        write_rows(path, [build(number) for number in range(NUM_ROWS)])

    return write


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, TSV, JSON Lines, a JSON array or Parquet, by the file's name."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)


def write_conll(path: Path) -> None:
    """Words with a part of speech and an entity's tag, as CoNLL 2003 has them."""
    kinds = ("O", "O", "B-PER", "I-PER", "O", "B-LOC")
    sentences = [
        "\n".join(f"{word} NN {kinds[place % 6]}" for place, word in enumerate(write_text(number).split()))
        for number in range(NUM_ROWS)
    ]
    path.write_text("-DOCSTART- -X- O\n\n" + "\n\n".join(sentences) + "\n", encoding="utf-8")


def write_named_classes(path: Path) -> None:
    """Pairs of texts whose labels have names in the file's schema, as `datasets` writes Parquet."""
    import datasets

    names = ["entailment", "neutral", "contradiction"]
    rows = [
        {"premise": write_text(number), "hypothesis": write_text(number + 1, 6), "label": number % 3}
        for number in range(NUM_ROWS)
    ]
    features = datasets.Features(
        premise=datasets.Value("string"), hypothesis=datasets.Value("string"), label=datasets.ClassLabel(names=names)
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def write_saved(path: Path) -> None:
    """A save_to_disk folder with two splits."""
    import datasets

    rows = [{"sentence": write_text(number), "label": number % 2, "idx": number} for number in range(NUM_ROWS)]
    splits = {"train": rows, "validation": rows[:20], "test": [{**row, "label": -1} for row in rows[:20]]}
    features = datasets.Features(
        sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]), idx=datasets.Value("int32")
    )
    found = {name: datasets.Dataset.from_list(each, features=features) for name, each in splits.items()}
    datasets.DatasetDict(found).save_to_disk(path)


def write_split_folder(path: Path) -> None:
    """A folder with a file for each split; the test file has no labels."""
    path.mkdir()
    rows = [{"id": number, "comment": write_text(number), "label": "ab"[number % 2]} for number in range(NUM_ROWS)]
    write_rows(path / "train.csv", rows)
    write_rows(path / "validation.csv", rows[:20])
    write_rows(path / "test.csv", [{"id": row["id"], "comment": row["comment"]} for row in rows[:20]])


def write_pictures(path: Path) -> None:
    """A folder of images for each class."""
    for number in range(24):
        write_image(path / CLASSES[number % 3] / f"{number}.png", number)


def write_split_pictures(path: Path) -> None:
    """The same for each split."""
    write_pictures(path / "train")
    write_pictures(path / "val")


def write_photos(path: Path) -> None:
    """A table beside a folder of images that it names."""
    rows = [{"file": f"photos/{number}.png", "label": CLASSES[number % 3]} for number in range(24)]
    for number, row in enumerate(rows):
        write_image(path.parent / row["file"], number)
    write_rows(path, rows)


def write_scans(path: Path) -> None:
    """Images inside of a Parquet file, as `datasets` stores them."""
    rows = []
    for number in range(24):
        content = io.BytesIO()
        build_image(number).save(content, "PNG")
        rows.append({"image": {"bytes": content.getvalue(), "path": None}, "digit": number % 3})
    write_rows(path, rows)


def _answer(number: int, is_answered: bool = True) -> Row:
    context = write_text(number, 60)
    word = context.split()[20]
    answers = {"text": [word], "answer_start": [context.index(f" {word}") + 1]}
    return {
        "id": f"q{number}",
        "title": "Rivers",
        "context": context,
        "question": f"{write_text(number, 7)}?",
        "answers": answers if is_answered else {"text": [], "answer_start": []},
    }


def _film(number: int) -> Row:
    genres = ["drama", "crime", "war"][: number % 3 + 1]
    return {"title": write_text(number, 3), "plot": write_text(number, 40), "genres": genres}


def _comment(number: int) -> Row:
    flags = {"toxic": number % 2, "insult": number % 3 % 2, "threat": number % 5 % 2}
    return {"id": f"{number:04x}", "comment_text": write_text(number), **flags}


def _news(number: int) -> Row:
    link, date = f"https://example.org/{number}", f"2026-01-{number % 28 + 1:02}"
    return {"link": link, "headline": write_text(number, 8), "category": f"section {number % 12}", "date": date}


def _words_and_tags(number: int) -> Row:
    tags = {name: _tags(number, range(count)) for name, count in (("pos_tags", 5), ("chunk_tags", 4), ("ner_tags", 3))}
    return {"id": str(number), "tokens": write_text(number).split(), **tags}


def _choices(number: int, names: Sequence[str]) -> dict[str, str]:
    return {name: write_text(number + place, 5) for place, name in enumerate(names)}


def _shared_chat(number: int) -> Row:
    turns = [{"from": "human", "value": write_text(number)}, {"from": "gpt", "value": write_text(number + 1)}]
    return {"conversations": turns}


def _chat(number: int) -> list[Row]:
    return [
        {"role": "user", "content": f"{write_text(number, 8)}?"},
        {"role": "assistant", "content": write_text(number + 3, 15)},
    ]


def _tags(number: int, names: Sequence[Any]) -> list[Any]:
    return [names[(number + place) % len(names)] for place in range(12)]


ENDINGS = ["ending0", "ending1", "ending2", "ending3"]
_TOOL = {"type": "function", "function": {"name": "read_level", "parameters": {"type": "object", "properties": {}}}}

FILES: tuple[InitFile, ...] = (
    InitFile(
        "reviews.csv", "reviews with one to five stars",
        rows_of(lambda n: {"review": write_text(n), "stars": n % 5 + 1}),
        "text_classification", {"text_column": "review", "label_column": "stars", "metric_for_best_model": "eval_accuracy"},
    ),
    InitFile(
        "spam.csv", "messages, few of which are spam",
        rows_of(lambda n: {"category": "spam" if n % 8 == 0 else "ham", "message": write_text(n)}),
        "text_classification", {"text_column": "message", "label_column": "category", "metric_for_best_model": "eval_f1_macro"},
    ),
    InitFile(
        "tickets.tsv", "a number, a subject, a text, and a column with a name of one's own that repeats",
        rows_of(lambda n: {"ticket_id": n, "subject": write_text(n, 4), "body": write_text(n, 30), "team": "xyz"[n % 3]}),
        "text_classification", {"text_column": "body", "label_column": "team"},
    ),
    InitFile(
        "paraphrases.jsonl", "pairs of sentences with 0 or 1",
        rows_of(lambda n: {"sentence1": write_text(n), "sentence2": write_text(n + 1), "label": n % 2, "idx": n}),
        "text_classification", {"text_column": "sentence1", "text_pair_column": "sentence2", "label_column": "label"},
    ),
    InitFile(
        "inference.parquet", "premises and hypotheses; the schema names the classes",
        write_named_classes,
        "text_classification", {"text_column": "premise", "text_pair_column": "hypothesis", "label_column": "label"},
    ),
    InitFile(
        "similarity.csv", "pairs of sentences with a score from 0 to 5",
        rows_of(lambda n: {"sentence1": write_text(n), "sentence2": write_text(n + 2), "score": f"{n % 26 / 5:.1f}"}),
        "text_classification", {"text_pair_column": "sentence2", "label_column": "score", "problem_type": "regression"},
    ),
    InitFile(
        "prices.parquet", "descriptions with a price",
        rows_of(lambda n: {"description": write_text(n, 20), "price": 10.5 + n * 1.25}),
        "text_classification", {"text_column": "description", "label_column": "price", "problem_type": "regression"},
    ),
    InitFile(
        "movies.jsonl", "plots with a list of genres",
        rows_of(_film),
        "text_classification", {"text_column": "plot", "label_column": "genres", "problem_type": "multi_label_classification"},
    ),
    InitFile(
        "toxic.csv", "comments with three columns of 0 and 1",
        rows_of(_comment),
        "text_classification",
        {"label_column": ["toxic", "insult", "threat"], "problem_type": "multi_label_classification"},
    ),
    InitFile(
        "news.json", "an array of headlines in twelve categories, each with its link and date",
        rows_of(_news),
        "text_classification", {"text_column": "headline", "label_column": "category"},
    ),
    InitFile(
        "intents.jsonl", "texts with a class, as a number and by its name",
        rows_of(lambda n: {"text": write_text(n), "label": n % 6, "label_text": f"intent {n % 6}"}),
        "text_classification", {"text_column": "text", "label_column": "label_text"},
    ),
    InitFile(
        "yes_or_no.jsonl", "questions and passages, and whether the answer is yes",
        rows_of(lambda n: {"question": f"{write_text(n, 6)}?", "passage": write_text(n, 40), "answer": n % 2 == 0}),
        "text_classification", {"text_column": "question", "text_pair_column": "passage", "label_column": "answer"},
    ),
    InitFile(
        "moods.csv", "Russian sentences",
        rows_of(lambda n: {"text": write_text(n, 10, _RUSSIAN), "label": ("радость", "грусть")[n % 2]}),
        "text_classification", {"text_column": "text", "label_column": "label"},
    ),
    InitFile(
        "entities.conll", "words with parts of speech and entities, one a line",
        write_conll,
        "token_classification", {"tokens_column": "tokens", "label_column": "ner_tags", "metric_for_best_model": "eval_f1"},
    ),
    InitFile(
        "entities.parquet", "lists of words, and of numbers for three kinds of tags",
        rows_of(_words_and_tags),
        "token_classification", {"tokens_column": "tokens", "label_column": "ner_tags"},
    ),
    InitFile(
        "speech.jsonl", "lists of words and of their parts of speech",
        rows_of(lambda n: {"words": write_text(n).split(), "upos": _tags(n, ("NOUN", "VERB", "ADJ"))}),
        "token_classification", {"tokens_column": "words", "label_column": "upos", "metric_for_best_model": "eval_accuracy"},
    ),
    InitFile(
        "squad.jsonl", "questions, with texts that hold their answers",
        rows_of(_answer),
        "question_answering", {"question_column": "question", "context_column": "context", "answers_column": "answers"},
    ),
    InitFile(
        "squad_v2.parquet", "the same, where some have none",
        rows_of(lambda n: _answer(n, n % 3 > 0)),
        "question_answering", {"version_2_with_negative": True},
    ),
    InitFile(
        "swag.csv", "beginnings with four endings, one of them right",
        rows_of(lambda n: {"sent1": write_text(n), "sent2": "He", **_choices(n, ENDINGS), "label": n % 4}),
        "multiple_choice",
        {"context_column": "sent1", "question_column": "sent2", "choice_columns": ENDINGS},
    ),
    InitFile(
        "exam.jsonl", "questions with a list of choices, and the number of the right one",
        rows_of(lambda n: {"question": f"{write_text(n)}?", "choices": [*_choices(n, "abcd").values()], "answer": n % 4}),
        "multiple_choice", {"context_column": "question", "choice_columns": ["choices"], "label_column": "answer"},
    ),
    InitFile(
        "quiz.csv", "questions with columns A to D, and the letter of the right one",
        rows_of(lambda n: {"question": f"{write_text(n)}?", **_choices(n, "ABCD"), "answer": "ABCD"[n % 4]}),
        "multiple_choice", {"choice_columns": ["A", "B", "C", "D"], "label_column": "answer"},
    ),
    InitFile(
        "chats.jsonl", "conversations",
        rows_of(lambda n: {"messages": _chat(n), "source": "forum"}),
        "causal_lm", {"messages_column": "messages", "assistant_only_loss": True},
    ),
    InitFile(
        "assistants.jsonl", "conversations with tools",
        rows_of(lambda n: {"messages": _chat(n), "tools": [_TOOL]}),
        "causal_lm", {"messages_column": "messages", "tools_column": "tools"},
    ),
    InitFile(
        "prompts.csv", "prompts and completions",
        rows_of(lambda n: {"prompt": write_text(n), "completion": write_text(n + 1)}),
        "causal_lm", {"prompt_column": "prompt", "completion_column": "completion"},
    ),
    InitFile(
        "turns.jsonl", "prompts and completions as messages",
        rows_of(lambda n: {"prompt": _chat(n)[:1], "completion": _chat(n)[1:]}),
        "causal_lm", {"prompt_column": "prompt", "completion_column": "completion"},
    ),
    InitFile(
        "instructions.json", "instructions without inputs, in Alpaca's words",
        rows_of(lambda n: {"instruction": write_text(n), "input": "", "output": write_text(n + 1)}),
        "causal_lm", {"prompt_column": "instruction", "completion_column": "output"},
    ),
    InitFile(
        "faq.csv", "questions and answers",
        rows_of(lambda n: {"Question": f"{write_text(n)}?", "Answer": write_text(n + 1, 25)}),
        "causal_lm", {"prompt_column": "Question", "completion_column": "Answer"},
    ),
    InitFile(
        "summaries.jsonl", "articles and summaries",
        rows_of(lambda n: {"id": n, "article": write_text(n, 80), "summary": write_text(n, 9)}),
        "seq2seq_lm", {"source_column": "article", "target_column": "summary", "source_prefix": "summarize: "},
    ),
    InitFile(
        "translations.jsonl", "objects with a text for each language",
        rows_of(lambda n: {"translation": {"de": write_text(n, 9, _GERMAN), "en": write_text(n, 9)}}),
        "seq2seq_lm", {"translation_column": "translation", "source_lang": "en", "target_lang": "de"},
    ),
    InitFile(
        "parallel.tsv", "a column for each language",
        rows_of(lambda n: {"en": write_text(n, 9), "de": write_text(n, 9, _GERMAN)}),
        "seq2seq_lm", {"source_column": "en", "target_column": "de"},
    ),
    InitFile(
        "corpus.jsonl", "texts, and --model names a decoder",
        rows_of(lambda n: {"text": write_text(n, 50), "url": f"https://example.org/{n}"}),
        "causal_lm", {"text_column": "text", "long_texts": "split"}, model="decoder",
    ),
    InitFile(
        "library.csv", "texts, and --model names an encoder",
        rows_of(lambda n: {"text": write_text(n, 50)}),
        "masked_lm", {"text_column": "text"}, model="encoder",
    ),
    InitFile(
        "saved", "a save_to_disk folder with three splits",
        write_saved,
        "text_classification", {"text_column": "sentence", "label_column": "label", "validation_split": "validation"},
    ),
    InitFile(
        "splits", "a folder with train.csv, validation.csv and a test.csv without labels",
        write_split_folder,
        "text_classification", {"text_column": "comment", "label_column": "label"},
    ),
    InitFile(
        "pictures", "a folder with a folder of images for each class",
        write_pictures,
        "image_classification", {"image_column": "image", "label_column": "label"},
    ),
    InitFile(
        "digits", "the same in folders train and val",
        write_split_pictures,
        "image_classification", {"image_column": "image", "label_column": "label"},
    ),
    InitFile(
        "photos.csv", "paths of images, which lead from the file's folder",
        write_photos,
        "image_classification", {"image_column": "file", "label_column": "label"},
    ),
    InitFile(
        "scans.parquet", "images as bytes, with a number from 0 to 2",
        write_scans,
        "image_classification", {"image_column": "image", "label_column": "digit"},
    ),
    InitFile(
        "plain.csv", "texts alone",
        rows_of(lambda n: {"text": write_text(n, 30)}),
        could_be=("causal_lm", "masked_lm"),
    ),
    InitFile(
        "columns.csv", "two texts with names of one's own",
        rows_of(lambda n: {"first_part": write_text(n, 20), "other_part": write_text(n + 1, 20)}),
        could_be=("causal_lm", "seq2seq_lm"),
    ),
    InitFile(
        "moods_and_topics.csv", "a text with two columns that could be its label",
        rows_of(lambda n: {"text": write_text(n), "mood": ("glad", "sad")[n % 2], "field": ("law", "art", "war")[n % 3]}),
        could_be=("text_classification",),
    ),
    InitFile(
        "inputs.json", "instructions with inputs, which no key reads",
        rows_of(lambda n: {"instruction": write_text(n % 7, 6), "input": write_text(n), "output": write_text(n + 1)}),
        could_be=("causal_lm", "masked_lm", "seq2seq_lm"),
    ),
    InitFile(
        "categories.jsonl", "instructions with texts they are about, and a category",
        rows_of(
            lambda n: {
                "instruction": write_text(n, 6), "context": write_text(n), "response": write_text(n + 1), "category": "ab"[n % 2]
            }
        ),
        could_be=("causal_lm", "masked_lm", "seq2seq_lm", "text_classification"),
    ),
    InitFile(
        "preferences.jsonl", "prompts with a preferred and a rejected answer",
        rows_of(lambda n: {"prompt": write_text(n), "chosen": write_text(n + 1), "rejected": write_text(n + 2)}),
        could_be=("causal_lm", "masked_lm", "seq2seq_lm"),
    ),
    InitFile(
        "sharegpt.jsonl", "conversations whose keys have other names",
        rows_of(_shared_chat),
    ),
    InitFile("table.csv", "numbers alone", rows_of(lambda n: {"height": n * 1.5, "weight": n * 2.5})),
)  # fmt: skip
