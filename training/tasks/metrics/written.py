"""How near written texts are to references: ROUGE (Lin 2004), BLEU (Papineni et al. 2002), chrF (Popović 2015), word error rate.

By the packages rouge-score, with stems of English words as transformers' examples have it, sacrebleu and jiwer. All in percent.
"""

from __future__ import annotations

from collections.abc import Sequence

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "word_error_rate")


def score_texts(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Of each ROUGE the mean F-measure over texts; BLEU, chrF and word error rate of all texts.

    rougeLsum takes each line for a sentence.
    The word error rate (Levenshtein 1966) is the words to replace, insert or delete, over the words of the references; it can be
    more than 100.
    """
    from jiwer import wer
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    rouges = [name for name in NAMES if name.startswith("rouge")]
    scorer = RougeScorer(rouges, use_stemmer=True)
    scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    found = {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in rouges}
    return {
        **found,
        "bleu": corpus_bleu(predictions, [references]).score,
        "chrf": corpus_chrf(predictions, [references]).score,
        "word_error_rate": 100 * wer(list(references), list(predictions)),
    }
