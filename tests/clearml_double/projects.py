"""The endpoints of projects."""

import copy

from clearml_double.rules import COMPANY, USER, Refused, new_id, now, project_name, without_nulls


class Projects:
    PROJECT_FILTERS = frozenset({"id", "name", "system_tags", "tags", "description"})

    def projects_create(self, body):
        name = project_name(body["name"])
        if any(project["name"] == name for project in self.projects.values()):
            raise Refused(801, f"Value combination already exists (unique field already contains this value): name={name}")  # fmt: skip
        location, _, basename = name.rpartition("/")
        parents = [project for project in self.projects.values() if project["name"] == location]
        parent = parents[0]["id"] if parents else self.projects_create({"name": location})["id"] if location else None
        project = {
            "id": new_id(), "name": name, "basename": basename, "company": COMPANY, "parent": parent,
            "user": USER, "description": body.get("description") or "", "created": now(), "last_update": now(),
            "tags": body.get("tags") or [], "system_tags": body.get("system_tags") or [],
            "default_output_destination": body.get("default_output_destination"),
        }  # fmt: skip
        self.projects[project["id"]] = project
        return {"id": project["id"]}

    def projects_get_all(self, body):
        return {"projects": self.find(self.projects.values(), body, self.PROJECT_FILTERS, "projects.get_all")}

    def projects_get_by_id(self, body):
        return {"project": without_nulls(copy.deepcopy(self.project(body["project"])))}

    def project(self, project_id):
        if project_id not in self.projects:
            raise Refused(401, f"Invalid project id: id={project_id}")
        return self.projects[project_id]
