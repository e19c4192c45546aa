"""Archives of images, as people pack them."""

import io
import tarfile
import zipfile


def pack(kind: str, members: dict[str, bytes]) -> bytes:
    """An archive of these files.

    Args:
        kind: zip, or the compression of a tar: "", gz, bz2, xz.
        members: name → content.
    """
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in members.items():
                packed.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode=f"w:{kind}") as packed:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                packed.addfile(member, io.BytesIO(content))
    return file.getvalue()
