"""Build a model's folder for the Hugging Face Hub and upload it."""
from .card import Card, build_card_folder, card_text, rewrite_card_folder
from .fetch import FETCHED, Fetched, fetch
from .push import Plan, own_repo_id, plan_push, push

__all__ = [
    'Card', 'FETCHED', 'Fetched', 'Plan', 'build_card_folder', 'card_text', 'fetch', 'own_repo_id', 'plan_push', 'push',
    'rewrite_card_folder']
