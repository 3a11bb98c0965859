"""The clients: each function takes a server's URL and returns complete() and stream().

Each is written as its users would write it, keeps its connection where it can, and is otherwise
left at its defaults. Each stands alone, imports included: its source, after a line that sets BODY,
is the script whose start is timed.
"""

from __future__ import annotations

from workload import BODY


def friendli_lite(url):
    import friendli_lite

    def complete():
        return friendli_lite.complete(BODY, server_url=url, token="t").text

    def stream():
        return (chunk.text for chunk in friendli_lite.stream(BODY, server_url=url, token="t"))

    return complete, stream


def http_client(url):
    """Python's own HTTP and JSON and nothing else: no checks, no errors, no dataclasses."""
    import http.client
    import json

    scheme, _, rest = url.partition("://")
    host, _, prefix = rest.partition("/")
    connections = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    connection = connections[scheme](host)
    headers = {"Authorization": "Bearer t", "Content-Type": "application/json"}

    def post(body):
        connection.request("POST", f"/{prefix}/v1/completions", json.dumps(body), headers)
        return connection.getresponse()

    def complete():
        return json.loads(post(BODY).read())["choices"][0]["text"]

    def stream():
        response = post({**BODY, "stream": True})
        rest = b""
        while data := response.read1():
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if event != b"data: [DONE]":
                    yield json.loads(event[6:])["choices"][0]["text"]

    return complete, stream


def plain_urllib(url):
    import json
    import urllib.request

    def post(body):
        headers = {"Authorization": "Bearer t", "Content-Type": "application/json"}
        data = json.dumps(body).encode()
        request = urllib.request.Request(url + "/v1/completions", data, headers)
        return urllib.request.urlopen(request, timeout=600)

    def complete():
        with post(BODY) as response:
            return json.load(response)["choices"][0]["text"]

    def stream():
        with post({**BODY, "stream": True}) as response:
            for line in response:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    yield json.loads(line[6:])["choices"][0]["text"]

    return complete, stream


def requests(url):
    import json

    import requests

    session = requests.Session()
    session.headers["Authorization"] = "Bearer t"
    url += "/v1/completions"

    def complete():
        return session.post(url, json=BODY, timeout=600).json()["choices"][0]["text"]

    def stream():
        with session.post(url, json={**BODY, "stream": True}, stream=True, timeout=600) as response:
            for line in response.iter_lines():
                if line and line != b"data: [DONE]":
                    yield json.loads(line[6:])["choices"][0]["text"]

    return complete, stream


def httpx(url):
    import json

    import httpx

    client = httpx.Client(headers={"Authorization": "Bearer t"}, timeout=600)
    url += "/v1/completions"

    def complete():
        return client.post(url, json=BODY).json()["choices"][0]["text"]

    def stream():
        import httpx_sse

        body = {**BODY, "stream": True}
        with httpx_sse.connect_sse(client, "POST", url, json=body) as source:
            for event in source.iter_sse():
                if event.data != "[DONE]":
                    yield json.loads(event.data)["choices"][0]["text"]

    return complete, stream


def openai(url):
    from openai import OpenAI

    completions = OpenAI(base_url=url + "/v1", api_key="t").completions

    def complete():
        return completions.create(**BODY).choices[0].text

    def stream():
        return (chunk.choices[0].text for chunk in completions.create(**BODY, stream=True))

    return complete, stream


def friendli(url):
    from friendli import SyncFriendli

    completions = SyncFriendli(token="t", x_friendli_team="t").container.completions

    def complete():
        return completions.complete(request=BODY, server_url=url).choices[0].text

    def stream():
        chunks = completions.complete(request={**BODY, "stream": True}, server_url=url)
        return (chunk.data.choices[0].text for chunk in chunks)

    return complete, stream


LABELS = {
    friendli_lite: "friendli_lite",
    http_client: "http.client with json",
    plain_urllib: "plain urllib",
    requests: "requests",
    httpx: "httpx",  # with httpx-sse for streams
    openai: "openai",
    friendli: "official SDK",
}
