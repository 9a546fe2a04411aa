"""A model's folder for the Hugging Face Hub, and the way there."""
from .card import Card, build_card_folder, card_text
from .push import Plan, plan_push, push

__all__ = ['Card', 'Plan', 'build_card_folder', 'card_text', 'plan_push', 'push']
