from .card import build_card_folder, card_text
from .convert import Conversion, convert_state_dict, read_checkpoint
from .push import Plan, plan_push, push
from .verify import verify_weights

__all__ = [
    'Conversion',
    'Plan',
    'build_card_folder',
    'card_text',
    'convert_state_dict',
    'plan_push',
    'push',
    'read_checkpoint',
    'verify_weights',
]
