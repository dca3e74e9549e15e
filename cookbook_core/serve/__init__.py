"""The wire protocol of Tinker clients, served from the local backend in one process.

wire.py            protobuf messages by field number; datums in, logprobs and samples out
fields.py          JSON bodies: every field is read or refused by name
replies.py         results to be polled for, errors in the client's form, repeated requests
turns.py           the requests of one model: in order, once each, none lost in silence
scoring.py         forward and forward_backward: decoded, the loss found, the data checked
models.py          adapters in training
samplers.py        snapshots and saved weights to sample from; spilled to disk, reloaded
graph_losses.py    uploaded losses: a torch.fx graph as data, run from a list of operations
saved_runs.py      runs and checkpoints on disk: lists, deletion, archives
guard.py           who may send what: key, Host, Origin, content type, size
completions.py     completions of a prompt as text, streamed or whole
chat.py            OpenAI-compatible requests and replies over them
page.py            the page for people
state.py           sessions, models, samplers: look-ups, limits, ends
service.py         what each endpoint of the SDK does
app.py             routes, refused endpoints, runs and checkpoints over REST, start and end
"""
