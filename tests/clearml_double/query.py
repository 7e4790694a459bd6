"""How documents are found: filters, order, pages, parts."""

import copy
import operator
import re

from clearml_double.rules import without_nulls


def project_fields(document, only_fields):
    """The parts of a document named by dotted paths, and its id."""
    if not only_fields:
        return copy.deepcopy(document)
    picked = {"id": document["id"]}
    for path in [only_fields] if isinstance(only_fields, str) else only_fields:
        value, place, keys = document, picked, path.split(".")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            continue
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = copy.deepcopy(value)
    return picked


def look_up(document, path):
    for key in path.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
DATES = {"created", "started", "completed", "last_update", "status_changed"}
PATTERNS = {"name", "comment", "uri"}


def matches(value, wanted, field):
    """Whether a document's value passes a filter of get_all: a pattern, a date range, or a list with operators."""
    if field in PATTERNS and isinstance(wanted, str):
        return re.search(wanted, value or "") is not None
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if field in DATES:
        for item in wanted:
            sign = next((s for s in COMPARE if item.startswith(s)), "")
            compare = COMPARE.get(sign, operator.eq)
            if value is None or not compare(value[:19], item[len(sign) :].replace(" ", "T")[:19]):
                return False
        return True
    held = set(value) if isinstance(value, list) else {value}
    included, excluded, every, reverse = set(), set(), False, False
    for item in wanted:
        if item in ("__$and", "__$all"):
            every = True
        elif item in ("__$or", "__$any"):
            every = False
        elif item == "__$not":
            reverse = True
        elif str(item).startswith("__$"):
            raise ValueError(f"operator {item} in a filter")
        elif reverse or (field in ("tags", "system_tags") and isinstance(item, str) and item.startswith("-")):
            excluded.add(item if reverse else item[1:])
            reverse = False
        else:
            included.add(item)
    if held & excluded:
        return False
    return not included or (included <= held if every else bool(included & held))


OPTIONS = {
    "only_fields", "order_by", "page", "page_size", "search_hidden", "search_text", "_any_", "_all_", "method",
    "allow_public", "scroll_id", "size", "refresh_scroll", "shallow_search", "include_subprojects",
}  # fmt: skip


class Queries:
    """What every get_all shares.

    ignored: filters that are not known: their answer would be wrong
    """

    def find(self, documents, body, known, endpoint):
        """What get_all answers: filters, then order, then page, then only_fields."""
        for field in set(body) - known - OPTIONS:
            self.ignored.add(f"{endpoint}: {field}")
        found = [
            document
            for document in documents
            if all(
                matches(look_up(document, field), body[field], field)
                for field in known & set(body)
                if body[field] not in (None, [], "")
            )
        ]
        for option, combine in (("_any_", any), ("_all_", all)):
            if search := body.get(option):
                pattern, fields = re.compile(search["pattern"]), search["fields"]
                found = [d for d in found if combine(pattern.search(str(look_up(d, f) or "")) for f in fields)]
        order = body.get("order_by") or []
        for path in reversed([order] if isinstance(order, str) else order):
            name, reverse = path.lstrip("-"), path.startswith("-")
            found.sort(key=lambda d, n=name: ((v := look_up(d, n)) is not None, v), reverse=reverse)
        if body.get("page_size"):
            start = (body.get("page") or 0) * body["page_size"]
            found = found[start : start + body["page_size"]]
        return [without_nulls(project_fields(document, body.get("only_fields"))) for document in found]
