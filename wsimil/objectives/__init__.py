"""What is minimised: one file per technique; objectives import the ground only and meet models through its protocols."""

from __future__ import annotations

from wsimil.objectives.attention_entropy import AttentionEntropy
from wsimil.objectives.averaged_weights import AveragedWeights
from wsimil.objectives.clam_instances import ClamInstances
from wsimil.objectives.mhim import MaskedHardInstances
from wsimil.objectives.slide_label import SlideLabel

__all__ = ["AttentionEntropy", "AveragedWeights", "ClamInstances", "MaskedHardInstances", "SlideLabel"]
