"""An OpenAI-compatible server and its page over one scheduler thread; and the terminal chat.

A chat request passes middleware.py (keys, sizes, the log), schema.py (what a request may be),
openai.py (the route), text.py (its prompt) and stream.py (its answer); service.py runs the
scheduler. scripts/serve.py and chat.py are its doors.
"""
