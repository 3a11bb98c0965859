"""What the clients ask and what the server responds; both sides import it, and it imports nothing.

A measuring process must not import the server: asyncio would count as the client's memory.
"""

BODY = {"model": "m", "prompt": "Say this is a test!", "max_tokens": 16}
WORDS = [" such", " a", " test", ",", " and", " more", " of", " it", " than", "."]
TEXT = "".join(WORDS)  # the text of the completion; a stream repeats it, one word to an event

SHORT, MEDIUM, LONG = STREAM_LENGTHS = (250, 1_000, 100_000)  # in events
MB = 1024 * 1024
