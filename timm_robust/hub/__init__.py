from .card import build_card_folder, card_text
from .push import Plan, plan_push, push

__all__ = [
    'Plan',
    'build_card_folder',
    'card_text',
    'plan_push',
    'push',
]
