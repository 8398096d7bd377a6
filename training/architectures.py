"""Facts about families of models that both training and the launcher's arithmetic need."""

from __future__ import annotations

# Classifiers that read the first token alone, by config.model_type; their classes are named <prefix>ForSequenceClassification.
# The last layer of these computes that token only (models/last_layer.py).
FIRST_TOKEN_CLASSIFIERS = {
    "bert": "Bert",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
}
