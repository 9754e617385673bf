"""Which trainers of nnU-Net v2 build the network that their plans say; another may compute something else with weights
of the same names and shapes, which no checkpoint tells.

Source: nnunetv2/training/nnUNetTrainer of MIC-DKFZ/nnUNet 2.8.1.
"""

from __future__ import annotations

import re

_AS_PLANNED = frozenset({
    "nnUNetTrainer", "nnUNet_Trainer_BS8", "nnUNetTrainerBenchmark", "nnUNetTrainerBenchmark_noDataLoading",
    # batch normalisation, which its weights show, and heads, of which a prediction uses the finest alone
    "nnUNetTrainerBN", "nnUNetTrainerNoDeepSupervision",
    # augmentation
    "nnUNetTrainerDA5", "nnUNetTrainerDA5ord0", "nnUNetTrainerDA5Segord0", "nnUNetTrainerNoDA",
    "nnUNetTrainer_DASegOrd0", "nnUNetTrainer_DASegOrd0_NoMirroring", "nnUNetTrainer_noDummy2DDA",
    "nnUNetTrainerNoMirroring", "nnUNetTrainer_NoMirroring", "nnUNetTrainer_onlyMirror01",
    "nnUNetTrainer_onlyMirror01_DASegOrd0", "nnUNetTrainer_onlyMirror01_DA5",
    # loss
    "nnUNetTrainerCELoss", "nnUNetTrainerDiceLoss", "nnUNetTrainerDiceCELoss_noSmooth", "nnUNetTrainerTopk10Loss",
    "nnUNetTrainerTopk10LossLS01", "nnUNetTrainerDiceTopK10Loss",
    # learning rate and optimiser
    "nnUNetTrainerCosAnneal", "nnUNetTrainer_warmup", "nnUNetTrainerAdam", "nnUNetTrainerAdam1en3",
    "nnUNetTrainerAdam3en4", "nnUNetTrainerVanillaAdam", "nnUNetTrainerVanillaAdam1en3",
    "nnUNetTrainerVanillaAdam3en4", "nnUNetTrainerAdan", "nnUNetTrainerAdan1en3", "nnUNetTrainerAdan3en4",
    "nnUNetTrainerAdan1en1", "nnUNetTrainerAdanCosAnneal",
    # which patches it sees
    "nnUNetTrainer_probabilisticOversampling", "nnUNetTrainer_probabilisticOversampling_033",
    "nnUNetTrainer_probabilisticOversampling_010",
})  # fmt: skip
"""Without how long they train."""

_DURATION = re.compile(r"_\d+ep(ochs?)?(?=_|$)")


def builds_as_planned(trainer: str) -> bool:
    """Whether the network of the trainer of this name is the one of the plans, however many epochs it trains."""
    return _DURATION.sub("", trainer) in _AS_PLANNED
