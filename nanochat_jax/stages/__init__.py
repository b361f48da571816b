"""What is trained after what: pretraining, mid-training, fine-tuning, reinforcement learning.

settings.py has their settings, stage.py what they share, loop.py the training loop; pretraining.py,
finetuning.py and rl.py are one stage each.
"""
