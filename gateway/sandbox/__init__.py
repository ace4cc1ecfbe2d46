"""An OpenAI images server of our own: free, strict, and with faults on request.

::

    server.py    runs it on a loopback port, in a thread or in the running loop
    app.py       the ASGI app: the endpoints, the shared account, the journal
    answer.py    what a bought picture looks like on the wire: JSON and SSE
    wire.py      sends it, or breaks it where a rule says so
    rules.py     scripted faults
    validate.py  what OpenAI refuses, in its own words
    forms.py     reads multipart and JSON bodies into fields and files
    usage.py     the bill
    draw.py      real pictures
"""
