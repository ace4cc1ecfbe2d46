"""An OpenAI images server of our own: free, strict, and with faults on request.

::

    server.py    runs it on a loopback port, in a thread or in the running loop
    app.py       the ASGI app: the endpoints, the shared account, the life of a request
    forms.py     reads multipart and JSON bodies into fields and files
    validate.py  what OpenAI refuses, in its own words
    models.py    which models there are, and until when
    answer.py    what a bought picture looks like on the wire: JSON and SSE
    usage.py     the bill
    costs.py     the bill in dollars, for an administrator
    draw.py      real pictures
    rules.py     scripted faults
    wire.py      sends an answer, or breaks it where a rule says so
    journal.py   what was received and billed
    watch.py     waiting for any of it without polling
"""
