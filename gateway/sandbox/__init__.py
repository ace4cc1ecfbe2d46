"""An OpenAI server of our own for all that is about images: free, strict, with faults on request.

::

    server.py        runs it on a loopback port, in a thread or in the running loop
    app.py           the ASGI app: the table of endpoints
    exchange.py      one request and its answer: the shared account, the life of a request, faults
    images.py        generations and edits
    azure.py         what is otherwise at Azure
    files.py         /v1/files
    responses.py     /v1/responses
    conversation.py  a request for a response, understood
    reply.py         the response
    events.py        the response told in events
    archive.py       what is remembered of it
    checks.py        moderations and provenance checks
    forms.py         reads multipart and JSON bodies into fields and files
    validate.py      what OpenAI refuses of an image request
    pictures.py      the pictures that come with a request
    refusals.py      its errors, in its own words
    models.py        which models there are, and until when
    answer.py        what a bought picture looks like on the wire: JSON and SSE
    usage.py         the bill
    costs.py         the bill in dollars, for an administrator
    draw.py          real pictures
    shelf.py         what is stored under a project
    rules.py         scripted faults
    wire.py          sends an answer, or breaks it where a rule says so
    journal.py       what was received and billed
    watch.py         waiting for any of it without polling
"""
