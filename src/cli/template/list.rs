//! What templates there are.

use std::path::Path;

use jiff::Timestamp;
use rewake::doctor;
use rewake::ids::TemplateId;
use rewake::template::{HostFacts, Template, TemplateDisk, TemplateError, TemplateStore, Users};
use rewake::units::Bytes;
use rewake::vmm::launch::LaunchSpec;
use serde_json::{Value, json};

use super::super::{Failure, Global, report};

/// One line of the list: a template, or why it is none.
struct Entry {
    name: TemplateId,
    template: Result<Template, TemplateError>,
    users: Users,
}

pub(super) fn list(store: &TemplateStore, global: Global) -> Result<(), Failure> {
    let mut entries = Vec::new();
    for name in store.list()? {
        let template = store.get(&name);
        // Removed since it was listed.
        if template.as_ref().is_err_and(TemplateError::is_missing) {
            continue;
        }
        let users = store.users(&name)?;
        entries.push(Entry {
            name,
            template,
            users,
        });
    }
    show_list(&entries, global)
}

/// The list of a root that is not there.
pub(super) fn none(global: Global) -> Result<(), Failure> {
    show_list(&[], global)
}

fn show_list(entries: &[Entry], global: Global) -> Result<(), Failure> {
    if global.json {
        let documents: Vec<Value> = entries.iter().map(document).collect();
        return report::json(&json!({ "templates": documents }));
    }
    let rows: Vec<Vec<String>> = entries.iter().map(row).collect();
    report::table(
        &[
            "template", "kind", "memory", "vcpus", "disk", "vmm", "age", "in use",
        ],
        &rows,
    )?;
    for entry in entries {
        if let Err(error) = &entry.template {
            report::error(error, global);
        }
    }
    Ok(())
}

fn document(entry: &Entry) -> Value {
    let mut document = match &entry.template {
        Ok(template) => template_document(template),
        Err(error) => json!({"error": report::words(error)}),
    };
    document["name"] = json!(entry.name.as_str());
    document["users"] = users_document(&entry.users);
    document
}

fn users_document(users: &Users) -> Value {
    json!({"vms": users.vms, "disks": users.disks})
}

/// What `--json` prints of a template.
pub(super) const TEMPLATE_KEYS: &str =
    "  name, dir, disk (null, or the image), memory (the image), memory_allocated_bytes,
  working_set: null, or bytes and extents; or error
  manifest: format, name, created, kind (built, imported, snapshot), vmm, host, guest_kernel,
    vcpus, memory, config_sha256, state_sha256, disk, disk_path, agent, lineage";

/// The manifest, and where things are.
pub(super) fn template_document(template: &Template) -> Value {
    json!({
        "name": template.id().as_str(),
        "dir": template.dir(),
        "disk": template.disk(),
        "memory": template.memory_image(),
        "memory_allocated_bytes": allocated(&template.memory_image()).map(|it| it.0),
        "manifest": template.manifest(),
        "working_set": match template.working_set() {
            Ok(None) => Value::Null,
            Ok(Some(set)) => json!({"bytes": set.size().0, "extents": set.extents().len()}),
            Err(error) => json!({"error": report::words(&error)}),
        },
    })
}

fn row(entry: &Entry) -> Vec<String> {
    let name = entry.name.to_string();
    let Ok(template) = &entry.template else {
        let mut row = vec![name, "damaged".to_owned()];
        row.resize(7, String::new());
        row.push(in_use(&entry.users));
        return row;
    };
    let manifest = template.manifest();
    let version = manifest.vmm.version;
    vec![
        name,
        manifest.kind.to_string(),
        Bytes(manifest.memory.bytes).to_string(),
        manifest.vcpus.to_string(),
        disk(template),
        version.map_or("?".to_owned(), |version| version.to_string()),
        age(manifest.created, Timestamp::now()),
        in_use(&entry.users),
    ]
}

/// What its clones read ahead.
fn working_set(template: &Template) -> String {
    match template.working_set() {
        Ok(None) => String::new(),
        Ok(Some(set)) => match set.extents().len() {
            1 => format!("{} in one piece", set.size()),
            pieces => format!("{} in {pieces} pieces", set.size()),
        },
        Err(error) => format!("not used: {}", report::words(&error)),
    }
}

fn disk(template: &Template) -> String {
    match &template.manifest().disk {
        None => "none".to_owned(),
        Some(TemplateDisk::Own { bytes }) => Bytes(*bytes).to_string(),
        Some(TemplateDisk::Base(base)) => format!("{} elsewhere", Bytes(base.bytes)),
    }
}

fn in_use(users: &Users) -> String {
    let count = |number: usize, one: &str, more: &str| match number {
        0 => None,
        1 => Some(format!("1 {one}")),
        number => Some(format!("{number} {more}")),
    };
    let parts = [
        count(users.vms, "VM", "VMs"),
        count(users.disks.len(), "disk", "disks"),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    parts.join(", ")
}

/// How long ago that was, in one unit.
fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(then.as_second()).max(0);
    for (unit, length) in [("d", 86_400), ("h", 3600), ("min", 60)] {
        if seconds >= length {
            return format!("{} {unit}", seconds / length);
        }
    }
    format!("{seconds} s")
}

/// The bytes that a file takes on its disk.
fn allocated(path: &Path) -> Option<Bytes> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(path).ok()?;
    Some(Bytes(found.blocks().saturating_mul(512)))
}

pub(super) fn show(
    store: &TemplateStore,
    name: &TemplateId,
    vmm: Option<&Path>,
    global: Global,
) -> Result<(), Failure> {
    let template = store.get(name)?;
    let users = store.users(name)?;
    let program = vmm.map(Path::to_owned);
    let program = program.or_else(|| doctor::find_program("cloud-hypervisor"));
    let facts = match program {
        Some(program) => HostFacts::gather(&LaunchSpec {
            program,
            ..LaunchSpec::default()
        }),
        None => HostFacts::of_machine(),
    };
    let verdict = template.check(&facts).err();
    if global.json {
        let mut document = template_document(&template);
        document["users"] = users_document(&users);
        document["usable"] = json!(verdict.is_none());
        document["problem"] = json!(verdict.as_ref().map(|error| report::words(error)));
        return report::json(&document);
    }
    for (what, text) in lines(&template, &users) {
        if !text.is_empty() {
            println!("{what:<12}{text}");
        }
    }
    let verdict = verdict.map_or("it is whole and can run here".to_owned(), |it| {
        report::words(&it)
    });
    println!("{:<12}{verdict}", "check");
    Ok(())
}

/// What is worth saying of a template; what is empty is left out.
fn lines(template: &Template, users: &Users) -> Vec<(&'static str, String)> {
    let manifest = template.manifest();
    let memory = &manifest.memory;
    let taken = allocated(&template.memory_image()).unwrap_or_default();
    let cpu = manifest.host.cpu.as_ref();
    let version = manifest.vmm.version;
    let version = version.map_or("unknown version".to_owned(), |version| version.to_string());
    let agent = manifest.agent.as_ref().map(|agent| {
        let version = agent.version.as_deref().unwrap_or_default();
        format!("{} {version}", agent.family)
    });
    let lineage = &manifest.lineage;
    let parents = [
        lineage.template.as_ref().map(|it| format!("template {it}")),
        lineage.sandbox.as_ref().map(|it| format!("sandbox {it}")),
        lineage.origin.clone(),
    ];
    let parents: Vec<String> = parents.into_iter().flatten().collect();
    let kernel = manifest.guest_kernel.as_ref();
    vec![
        ("template", template.id().to_string()),
        ("kind", manifest.kind.to_string()),
        ("created", manifest.created.to_string()),
        ("directory", template.dir().display().to_string()),
        (
            "memory",
            format!(
                "{} in {}, {taken} of it on the disk",
                Bytes(memory.bytes),
                memory.image.file_name()
            ),
        ),
        ("working set", working_set(template)),
        ("vcpus", manifest.vcpus.to_string()),
        ("disk", disk(template)),
        ("vmm", format!("{version} {}", manifest.vmm.build)),
        ("processor", cpu.map_or(String::new(), ToString::to_string)),
        ("host kernel", manifest.host.kernel.clone()),
        (
            "kernel",
            kernel.map_or(String::new(), |it| it.path.display().to_string()),
        ),
        ("agent", agent.unwrap_or_default().trim().to_owned()),
        ("made from", parents.join(", ")),
        ("in use", in_use(users)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_told_in_one_unit() {
        let then: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
        for (now, told) in [
            ("2026-11-26T12:00:00Z", "0 s"),
            ("2026-11-26T12:00:59Z", "59 s"),
            ("2026-11-26T13:00:00Z", "1 h"),
            ("2026-11-29T11:00:00Z", "2 d"),
            // A clock that was set back.
            ("2026-11-26T11:00:00Z", "0 s"),
        ] {
            assert_eq!(age(then, now.parse().unwrap()), told, "{now}");
        }
    }
}
