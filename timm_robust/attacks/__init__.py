from .adaptive import Adaptive
from .apgd import APGD, APGDT
from .autoattack import AutoAttack, Ensemble
from .ball import Ball, InputSpace
from .base import Attack
from .best import Best
from .checks import (
    check_batch,
    check_classes,
    check_images,
    check_tensor,
    error_rates,
    logits_of,
    wrong_classes,
)
from .clean import Clean
from .context import ATTACK_BN_MODES, attack_mode, input_gradient, input_gradients
from .cw_l2 import CWL2
from .ddn import DDN
from .fab import FAB, FABT
from .fast_model import FastModel, make_fast_model
from .fmn import FMN
from .gradient import GradientAttack, IterativeAttack
from .losses import (
    cross_entropy,
    cw_loss,
    dlr,
    dlr_targeted,
    gap_targeted,
    hard_labels,
    logit_gap,
    probability_margin,
)
from .malt import MALT
from .minimum_norm import MinimumNorm
from .noise import image_seeds
from .pgd import BIM, FGSM, FGSMRS, MIM, NFGSM, PGD, CWLinf, PGDTargeted
from .quick import Quick
from .rays import RayS
from .registry import ATTACKS, attack_from_dict, attack_names, parse_attack, parse_attacks, register_attack
from .square import Square
from .state import AttackResult, Batch, State, keep_best
from .threat import (
    L1,
    L2,
    NORMS,
    Linf,
    ThreatModel,
    madry_step_size,
    make_threat,
    nofrost_step_size,
    norm_names,
    parse_eps,
    parse_threat,
    parse_threats,
    register_norm,
)

__all__ = [
    'APGD',
    'APGDT',
    'ATTACKS',
    'Adaptive',
    'Attack',
    'AttackResult',
    'AutoAttack',
    'BIM',
    'ATTACK_BN_MODES',
    'Ball',
    'Best',
    'Batch',
    'CWL2',
    'CWLinf',
    'Clean',
    'DDN',
    'Ensemble',
    'FAB',
    'FABT',
    'FGSM',
    'FGSMRS',
    'FMN',
    'FastModel',
    'GradientAttack',
    'InputSpace',
    'IterativeAttack',
    'L1',
    'L2',
    'Linf',
    'MALT',
    'MIM',
    'MinimumNorm',
    'NFGSM',
    'NORMS',
    'PGD',
    'PGDTargeted',
    'Quick',
    'RayS',
    'Square',
    'State',
    'ThreatModel',
    'attack_from_dict',
    'attack_names',
    'attack_mode',
    'check_batch',
    'check_classes',
    'check_images',
    'check_tensor',
    'cross_entropy',
    'cw_loss',
    'dlr',
    'dlr_targeted',
    'gap_targeted',
    'error_rates',
    'hard_labels',
    'image_seeds',
    'input_gradient',
    'input_gradients',
    'keep_best',
    'logit_gap',
    'logits_of',
    'madry_step_size',
    'make_fast_model',
    'make_threat',
    'nofrost_step_size',
    'norm_names',
    'parse_attack',
    'parse_attacks',
    'parse_eps',
    'parse_threat',
    'parse_threats',
    'probability_margin',
    'register_attack',
    'register_norm',
    'wrong_classes',
]
