"""A server that plays the hard cases of the protocol to a client under test, and judges it.

The client is any program; all that is judged is what it does on the wire. docs/client-authors.md
tells what the program has to do. Nothing here is shared with the server or with a client of this
project: it is a second reading of docs/protocol.md.
"""
