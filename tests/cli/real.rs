//! The same commands with real Cloud Hypervisor and the probe guest.

use std::path::Path;

use super::place::{Place, cells};
use crate::real_vmm::RealVmm;

/// What stands in the way, else the words that start Cloud Hypervisor here.
fn vmm(place: &Place) -> Result<String, String> {
    let vmm = RealVmm::find(Path::new(&place.file("")))?;
    Ok(format!("--vmm-env {}", vmm.assignment()))
}

#[test]
fn root_kvm_the_commands_drive_cloud_hypervisor() {
    let test = "root_kvm_the_commands_drive_cloud_hypervisor";
    let Some(place) = Place::new(test) else {
        return;
    };
    let vmm = match vmm(&place) {
        Ok(vmm) => vmm,
        Err(reason) => return eprintln!("SKIP {test}: {reason}"),
    };
    let image = place.file("image.raw");
    std::fs::write(&image, vec![5; 1 << 20]).unwrap();
    place.succeed(&format!(
        "template build probe --probe-guest --rootfs {image} --disk-mode copy \
         --memory-mib 128 {vmm}"
    ));
    let before = place.census();
    let launch = |template: &str, id: &str| {
        let words = format!("launch {template} --id {id} --disk-mode copy {vmm}");
        let (code, launched) = place.json(&words);
        assert_eq!(code, 0, "{launched}");
        launched
    };
    let one = launch("probe", "one");
    assert_eq!(one["vm"]["stand_in"], false);
    assert_eq!(one["vm"]["memory_mode"], "map");
    let guest = &one["memory"]["guest"];
    assert_eq!(guest["size_bytes"], 128 << 20);
    let private = guest["private_bytes"].as_u64().unwrap();
    assert!(private < 16 << 20, "mapped, not copied: {guest}");
    assert!(guest["file_bytes"].as_u64().unwrap() > 0, "{guest}");
    place.succeed("pause one");
    let (code, resumed) = place.json(&format!("resume one {vmm}"));
    assert_eq!(code, 0, "{resumed}");
    assert_eq!(resumed["vm"]["memory_mode"], "shared");
    assert_eq!(resumed["address"], one["address"]);
    place.succeed("snapshot one warm");
    launch("warm", "two");
    let table = place.run("ls");
    assert!(!table.err.contains("stand-in"), "{table:?}");
    let rows: Vec<_> = table.out.lines().skip(1).map(cells).collect();
    assert_eq!(rows.len(), 2, "{table:?}");
    assert!(rows.iter().all(|row| row[1] == "running"), "{table:?}");
    let (_, census) = place.json("recover");
    assert_eq!(census["adopted"], serde_json::json!(["one", "two"]));
    assert_eq!(place.succeed("pause --all").lines().count(), 2);
    place.succeed("destroy --all");
    place.succeed("template rm warm");
    assert_eq!(place.census(), before);
}
