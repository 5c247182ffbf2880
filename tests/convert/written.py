"""Checkpoint files written byte by byte, to be also what PyTorch never saves."""

import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    return f"I{value}\n".encode()


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key, count, kind="FloatStorage", tail=b""):
    identity = text("storage") + name("torch", kind) + text(key) + text("cpu")
    return b"(" + identity + number(count) + tail + b"tQ"


def tensor(key, count, shape, strides, offset=0, kind="FloatStorage", tail=b""):
    """The opcodes of a tensor in a storage of `count` elements."""
    arguments = storage(key, count, kind, tail) + number(offset) + numbers(shape)
    arguments += numbers(strides) + b"\x89" + name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def mapping(entries):
    body = b"".join(text(key) + value for key, value in entries.items())
    return b"}(" + body + b"u"


def program(body):
    """A whole pickle of the opcodes of one value."""
    return b"\x80\x02" + body + b"."


def zip_file(path, pickled, records=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in (records or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def stream_file(path, pickled, records=None):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    with open(path, "wb") as file:
        for value in (MAGIC, 1001, system):
            pickle.dump(value, file, protocol=2)
        file.write(pickled)
        records = records or {}
        pickle.dump(list(records), file, protocol=2)
        file.writelines(
            struct.pack("<q", len(data) // 4) + data for data in records.values()
        )
    return path


def tar_file(path, arrays):
    """The oldest format: float32 arrays by name, each with a storage of its own."""
    storages, tensors, keys = io.BytesIO(), io.BytesIO(), {}
    for stream in (storages, tensors):
        pickle.dump(len(arrays), stream, protocol=2)
    for index, (label, array) in enumerate(arrays.items()):
        root, key = 100 + index, 500 + index
        keys[label] = key
        header = numbers_free(root, text("cpu"), name("torch", "FloatStorage"))
        storages.write(program(header))
        storages.write(struct.pack("<q", array.size) + array.tobytes())
        header = numbers_free(key, number(root), name("torch", "FloatTensor"))
        tensors.write(program(header))
        geometry = [*array.shape, *(s // 4 for s in array.strides), 0]
        tensors.write(struct.pack("<ii", array.ndim, 0))
        tensors.write(struct.pack(f"<{len(geometry)}q", *geometry))
    pickle.dump([], storages, protocol=2)
    entries = {label: text(str(key)) + b"Q" for label, key in keys.items()}
    members = {"storages": storages.getvalue(), "tensors": tensors.getvalue()}
    members["pickle"] = program(mapping(entries))
    with tarfile.open(path, "w") as archive:
        for label, data in members.items():
            info = tarfile.TarInfo(label)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def numbers_free(key, *rest):
    """A tuple that begins with a number."""
    return b"(" + number(key) + b"".join(rest) + b"t"


def floats(count, start=0.0):
    return np.arange(start, start + count, dtype=np.float32).tobytes()
