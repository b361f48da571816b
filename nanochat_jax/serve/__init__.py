"""An OpenAI-compatible server and its page over one scheduler thread; and the terminal chat.

server.py and app.py are its door (scripts/serve.py); schema.py says what a request may be,
openai.py has the routes, stream.py carries tokens to the client.
"""
