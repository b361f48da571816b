"""An OpenAI-compatible server and its page over one scheduler thread; and the terminal chat.

A chat request passes middleware.py (keys, sizes, the log), openai.py (the route), schema.py (what a
request may be), text.py (its prompt), service.py (the scheduler) and stream.py (its answer).
"""
