//! `state.json`: a tree of opaque states, each JSON inside a JSON string.
//!
//! CH: vm-migration/src/lib.rs, `Snapshot` and `SnapshotData`. A node is
//! `{"snapshots": {id: node}, "snapshot_data": {"state": "<JSON as a string>"} | null}`.
//! Only what a restore must know is decoded: the memory manager at once, all else when asked
//! for. The rest is CH's own and stays as it is, to the byte.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::layout::MemoryLayout;
use super::memory::{
    MemoryDocument, MemoryError, MemoryLimits, MemoryState, RamMapping, SavedRange,
};
use crate::vm_config::MacAddr;
use crate::wire::excerpt::excerpt;
use crate::wire::json::JsonFault;

/// How much of a state is accepted. The size in bytes is bounded by the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateLimits {
    /// Most levels of nodes; CH uses five.
    pub max_depth: usize,
    /// Most nodes in the whole tree.
    pub max_nodes: usize,
    /// Bounds of the memory description.
    pub memory: MemoryLimits,
}

impl Default for StateLimits {
    fn default() -> Self {
        Self {
            max_depth: 16,
            max_nodes: 16 << 10,
            memory: MemoryLimits::default(),
        }
    }
}

/// Why a `state.json` was refused.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It is not text.
    #[error("It is not UTF-8")]
    NotUtf8(#[source] std::str::Utf8Error),
    /// It is not JSON, or not of the shape of a snapshot.
    #[error("It is not a snapshot tree")]
    Syntax(#[source] JsonFault),
    /// The tree has too many levels.
    #[error("The tree is deeper than {limit} levels")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
    /// The tree has too many nodes.
    #[error("The tree has more than {limit} nodes")]
    TooManyNodes {
        /// The limit.
        limit: usize,
    },
    /// Two nodes beside each other have the same id: which one counts is a matter of taste.
    #[error("The node {id} is there twice")]
    DuplicateNode {
        /// The id, escaped and cut.
        id: String,
    },
    /// A node that every snapshot has is missing, or has no state.
    #[error("The state of {node} is missing")]
    Missing {
        /// Its id.
        node: String,
    },
    /// The state of one node is not what CH writes.
    #[error("The state of {node} cannot be read")]
    Node {
        /// Its id.
        node: String,
        /// The cause.
        #[source]
        source: JsonFault,
    },
    /// The memory description is impossible.
    #[error("The memory description is refused")]
    Memory(#[source] MemoryError),
}

/// Which CPU a snapshot was taken on, from its common CPUID table (x86-64).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuIdentity {
    /// The vendor text of leaf 0: `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// Leaf 1, EAX: family, model and stepping.
    pub signature: u32,
}

/// One entry of the CPUID table in `state.json` (CH: hypervisor/src/arch/x86/mod.rs,
/// `CpuIdEntry`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct CpuidEntry {
    /// The leaf: what the guest puts into EAX.
    pub function: u32,
    /// The sub-leaf: what it puts into ECX.
    #[serde(default)]
    pub index: u32,
    /// The answer in EAX.
    pub eax: u32,
    /// The answer in EBX.
    pub ebx: u32,
    /// The answer in ECX.
    pub ecx: u32,
    /// The answer in EDX.
    pub edx: u32,
}

/// A checked `state.json`, with the bytes it was read from.
#[derive(Debug, Clone)]
pub struct State {
    text: String,
    index: Index,
    memory: MemoryState,
}

/// Where in the text things are. Every range is a JSON string with its quotes.
#[derive(Debug, Clone, Default)]
struct Index {
    root: Option<Range<usize>>,
    memory_manager: Option<Range<usize>>,
    vcpus: usize,
    devices: Vec<(String, Option<Range<usize>>)>,
}

impl State {
    /// Checks the bytes of a `state.json` and keeps them.
    ///
    /// # Errors
    /// [`StateError`]; every variant is a refusal of the content.
    pub fn parse(bytes: Vec<u8>, limits: &StateLimits) -> Result<Self, StateError> {
        let text =
            String::from_utf8(bytes).map_err(|error| StateError::NotUtf8(error.utf8_error()))?;
        let index = Walk::run(&text, limits)?;
        let missing = || StateError::Missing {
            node: MEMORY_MANAGER.to_owned(),
        };
        let span = index.memory_manager.clone().ok_or_else(missing)?;
        let inner = decode(&text[span], MEMORY_MANAGER)?;
        let memory = serde_json::from_str::<MemoryDocument<'_>>(&inner)
            .and_then(|document| MemoryState::read(&document))
            .map_err(node_error(MEMORY_MANAGER))?
            .check(&limits.memory)
            .map_err(StateError::Memory)?;
        Ok(Self {
            text,
            index,
            memory,
        })
    }

    /// The bytes as they were read.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.text.as_bytes()
    }

    /// The memory description.
    #[must_use]
    pub fn memory(&self) -> &MemoryState {
        &self.memory
    }

    /// How many vCPUs have a saved state.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.index.vcpus
    }

    /// The ids of the device manager's nodes, in the order of the file: `_disk0`,
    /// `_virtio-pci-_disk0`, `__rng`, ...
    pub fn device_ids(&self) -> impl Iterator<Item = &str> {
        self.index.devices.iter().map(|(id, _)| id.as_str())
    }

    /// Whether the device manager has a node of this id.
    #[must_use]
    pub fn has_device(&self, id: &str) -> bool {
        self.device_ids().any(|device| device == id)
    }

    /// The MAC address that the guest sees on the network device `id`.
    ///
    /// The one in `config.json` is only for show after a restore: CH takes this one
    /// (virtio-devices/src/net.rs, `NetState`).
    ///
    /// # Errors
    /// [`StateError::Missing`] without such a device, [`StateError::Node`] if it is not a
    /// network device.
    pub fn guest_mac(&self, id: &str) -> Result<MacAddr, StateError> {
        #[derive(Deserialize)]
        struct Net {
            config: NetSpace,
        }
        #[derive(Deserialize)]
        struct NetSpace {
            mac: [u8; 6],
        }
        let span = self
            .index
            .devices
            .iter()
            .find(|(device, _)| device == id)
            .and_then(|(_, span)| span.clone())
            .ok_or_else(|| StateError::Missing { node: excerpt(id) })?;
        let inner = decode(&self.text[span], id)?;
        let net: Net = serde_json::from_str(&inner).map_err(node_error(id))?;
        Ok(MacAddr(net.config.mac))
    }

    /// Whether the guest's clock was saved. On v53 it then jumps by the downtime.
    ///
    /// # Errors
    /// [`StateError::Node`] if the root's state is not what CH writes.
    pub fn has_clock(&self) -> Result<bool, StateError> {
        #[derive(Deserialize)]
        struct Root {
            clock: Option<IgnoredAny>,
        }
        let Some(inner) = self.root()? else {
            return Ok(false);
        };
        let root: Root = serde_json::from_str(&inner).map_err(node_error(ROOT))?;
        Ok(root.clock.is_some())
    }

    /// The CPU that the snapshot was taken on, where it says so.
    ///
    /// # Errors
    /// [`StateError::Node`] if the root's state is not what CH writes.
    pub fn cpu(&self) -> Result<Option<CpuIdentity>, StateError> {
        let table = self.cpuid()?;
        let leaf = |function| table.iter().find(|l| l.function == function);
        let (Some(zero), Some(one)) = (leaf(0), leaf(1)) else {
            return Ok(None);
        };
        // CPUID spells the vendor in EBX, EDX, ECX.
        let vendor: Vec<u8> = [zero.ebx, zero.edx, zero.ecx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        Ok(Some(CpuIdentity {
            vendor: vendor.escape_ascii().to_string(),
            signature: one.eax,
        }))
    }

    /// The CPUID table that all vCPUs share, in the order of the file; empty where the state
    /// has none.
    ///
    /// # Errors
    /// [`StateError::Node`] if the root's state is not what CH writes.
    pub fn cpuid(&self) -> Result<Vec<CpuidEntry>, StateError> {
        #[derive(Deserialize)]
        struct Root {
            #[serde(default)]
            common_cpuid: Vec<CpuidEntry>,
        }
        let Some(inner) = self.root()? else {
            return Ok(Vec::new());
        };
        let root: Root = serde_json::from_str(&inner).map_err(node_error(ROOT))?;
        Ok(root.common_cpuid)
    }

    /// The bytes of a `state.json` that has RAM mapped from a file: the list of saved ranges
    /// is empty, and every mapping has its offset of `layout`. All else is as it was, to the
    /// byte.
    ///
    /// `layout` must have been found in this state's [`MemoryState`].
    ///
    /// # Errors
    /// [`StateError::Missing`] if the layout is of another snapshot.
    pub fn mapped_from_file(&self, layout: &MemoryLayout) -> Result<Vec<u8>, StateError> {
        self.with_memory(&[], layout.offsets())
    }

    /// The bytes of a `state.json` that has RAM read from a zone's file, as if it had been
    /// saved there: the saved ranges are the mappings in the order of the file. Memory that
    /// is filled so has no file, hence no offsets.
    ///
    /// `layout` must have been found in this state's [`MemoryState`].
    ///
    /// # Errors
    /// [`StateError::Missing`] if the layout is of another snapshot, or if the mappings do not
    /// follow one another in the file ([`MemoryLayout::as_ranges`]).
    pub fn read_from_file(&self, layout: &MemoryLayout) -> Result<Vec<u8>, StateError> {
        let Some(ranges) = layout.as_ranges(&self.memory) else {
            return Err(StateError::Missing {
                node: MEMORY_MANAGER.to_owned(),
            });
        };
        self.with_memory(&ranges, &vec![0; layout.offsets().len()])
    }

    /// Replaces the list of saved ranges, and the file offset of every mapping.
    fn with_memory(&self, saved: &[SavedRange], offsets: &[u64]) -> Result<Vec<u8>, StateError> {
        let missing = || StateError::Missing {
            node: MEMORY_MANAGER.to_owned(),
        };
        if offsets.len() != self.memory.mappings().len() {
            return Err(missing());
        }
        let span = self.index.memory_manager.clone().ok_or_else(missing)?;
        let inner = decode(&self.text[span.clone()], MEMORY_MANAGER)?;
        let document: MemoryDocument<'_> =
            serde_json::from_str(&inner).map_err(node_error(MEMORY_MANAGER))?;
        let ranges = position(&inner, document.memory_ranges.get()).ok_or_else(missing)?;
        let mappings = position(&inner, document.guest_ram_mappings.get()).ok_or_else(missing)?;
        let moved: Vec<RamMapping> = self
            .memory
            .mappings()
            .iter()
            .zip(offsets)
            .map(|(mapping, &file_offset)| RamMapping {
                file_offset,
                ..mapping.clone()
            })
            .collect();
        let moved = serde_json::to_string(&moved).map_err(node_error(MEMORY_MANAGER))?;
        let saved = serde_json::to_string(saved).map_err(node_error(MEMORY_MANAGER))?;
        let saved = format!(r#"{{"data":{saved}}}"#);
        let mut edits = [(ranges, saved.as_str()), (mappings, moved.as_str())];
        edits.sort_unstable_by_key(|(span, _)| span.start);
        let inner = splice(&inner, &edits);
        let outer = serde_json::to_string(&inner).map_err(node_error(MEMORY_MANAGER))?;
        Ok(splice(&self.text, &[(span, &outer)]).into_bytes())
    }

    fn root(&self) -> Result<Option<String>, StateError> {
        self.index
            .root
            .clone()
            .map(|span| decode(&self.text[span], ROOT))
            .transpose()
    }
}

const ROOT: &str = "root";
const MEMORY_MANAGER: &str = "memory-manager";
const CPU_MANAGER: &str = "cpu-manager";
const DEVICE_MANAGER: &str = "device-manager";

fn node_error(node: &str) -> impl FnOnce(serde_json::Error) -> StateError {
    let node = excerpt(node);
    move |error| StateError::Node {
        node,
        source: JsonFault::new(&error),
    }
}

/// Undoes the outer of the two encodings.
fn decode(string: &str, node: &str) -> Result<String, StateError> {
    serde_json::from_str(string).map_err(node_error(node))
}

/// Where in the tree a node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    MemoryManager,
    CpuManager,
    DeviceManager,
    /// The device of this position in [`Index::devices`].
    Device(usize),
    Elsewhere,
}

/// One pass over the tree. Nothing is kept but positions, vCPU count and device ids.
struct Walk<'de> {
    text: &'de str,
    limits: StateLimits,
    nodes: usize,
    index: Index,
    /// Set where serde's error could not carry the reason.
    refusal: Option<StateError>,
}

impl<'de> Walk<'de> {
    fn run(text: &'de str, limits: &StateLimits) -> Result<Index, StateError> {
        let mut walk = Self {
            text,
            limits: *limits,
            nodes: 0,
            index: Index::default(),
            refusal: None,
        };
        let mut json = serde_json::Deserializer::from_str(text);
        let seed = NodeSeed {
            walk: &mut walk,
            place: Place::Root,
            depth: 1,
        };
        match seed.deserialize(&mut json).and_then(|()| json.end()) {
            Ok(()) => Ok(walk.index),
            Err(error) => Err(walk
                .refusal
                .unwrap_or(StateError::Syntax(JsonFault::new(&error)))),
        }
    }

    fn refuse<E: de::Error>(&mut self, refusal: StateError) -> E {
        let error = E::custom(&refusal);
        self.refusal = Some(refusal);
        error
    }

    fn enter<E: de::Error>(&mut self, depth: usize) -> Result<(), E> {
        self.nodes += 1;
        if depth > self.limits.max_depth {
            let limit = self.limits.max_depth;
            return Err(self.refuse(StateError::TooDeep { limit }));
        }
        if self.nodes > self.limits.max_nodes {
            let limit = self.limits.max_nodes;
            return Err(self.refuse(StateError::TooManyNodes { limit }));
        }
        Ok(())
    }

    /// Where the child `id` of a node at `parent` stands.
    fn place(&mut self, parent: Place, id: &str) -> Place {
        match (parent, id) {
            (Place::Root, MEMORY_MANAGER) => Place::MemoryManager,
            (Place::Root, CPU_MANAGER) => Place::CpuManager,
            (Place::Root, DEVICE_MANAGER) => Place::DeviceManager,
            (Place::CpuManager, _) => {
                self.index.vcpus += 1;
                Place::Elsewhere
            }
            (Place::DeviceManager, id) => {
                self.index.devices.push((id.to_owned(), None));
                Place::Device(self.index.devices.len() - 1)
            }
            _ => Place::Elsewhere,
        }
    }

    fn record(&mut self, place: Place, state: &'de RawValue) {
        let span = position(self.text, state.get());
        match place {
            Place::Root => self.index.root = span,
            Place::MemoryManager => self.index.memory_manager = span,
            Place::Device(index) => self.index.devices[index].1 = span,
            Place::CpuManager | Place::DeviceManager | Place::Elsewhere => {}
        }
    }
}

/// Where `part`, a slice of `text`, stands in it.
pub(super) fn position(text: &str, part: &str) -> Option<Range<usize>> {
    let start = (part.as_ptr() as usize).checked_sub(text.as_ptr() as usize)?;
    let span = start..start.checked_add(part.len())?;
    (text.get(span.clone()) == Some(part)).then_some(span)
}

/// Replaces parts of a text. They are in order and do not overlap.
fn splice(text: &str, edits: &[(Range<usize>, &str)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut kept = 0;
    for (span, replacement) in edits {
        out.push_str(&text[kept..span.start]);
        out.push_str(replacement);
        kept = span.end;
    }
    out.push_str(&text[kept..]);
    out
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum NodeField {
    Snapshots,
    SnapshotData,
    #[serde(other)]
    Unknown,
}

#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow)]
    state: &'a RawValue,
}

struct NodeSeed<'w, 'de> {
    walk: &'w mut Walk<'de>,
    place: Place,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for NodeSeed<'_, 'de> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for NodeSeed<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a snapshot node")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.walk.enter(self.depth)?;
        let (mut children, mut data) = (false, false);
        while let Some(field) = map.next_key::<NodeField>()? {
            match field {
                NodeField::Snapshots if children => {
                    return Err(de::Error::duplicate_field("snapshots"));
                }
                NodeField::SnapshotData if data => {
                    return Err(de::Error::duplicate_field("snapshot_data"));
                }
                NodeField::Snapshots => {
                    children = true;
                    map.next_value_seed(ChildrenSeed {
                        walk: self.walk,
                        place: self.place,
                        depth: self.depth + 1,
                    })?;
                }
                NodeField::SnapshotData => {
                    data = true;
                    if let Some(data) = map.next_value::<Option<Data<'de>>>()? {
                        if !data.state.get().starts_with('"') {
                            return Err(de::Error::custom("state is not a string"));
                        }
                        self.walk.record(self.place, data.state);
                    }
                }
                NodeField::Unknown => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        if children {
            Ok(())
        } else {
            Err(de::Error::missing_field("snapshots"))
        }
    }
}

struct ChildrenSeed<'w, 'de> {
    walk: &'w mut Walk<'de>,
    place: Place,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for ChildrenSeed<'_, 'de> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ChildrenSeed<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of snapshot nodes")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = std::collections::BTreeSet::new();
        while let Some(id) = map.next_key::<String>()? {
            let place = self.walk.place(self.place, &id);
            map.next_value_seed(NodeSeed {
                walk: self.walk,
                place,
                depth: self.depth,
            })?;
            if seen.contains(&id) {
                return Err(self
                    .walk
                    .refuse(StateError::DuplicateNode { id: excerpt(&id) }));
            }
            seen.insert(id);
        }
        Ok(())
    }
}
