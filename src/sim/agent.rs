//! `rewake-sim guest-agent`: the guest agent alone, inside a real Linux guest.
//!
//! Nonce, counter and pattern are in the memory of this process only: a guest that was
//! restored still has them, one that booted has others.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::envd::{Agent, Conversation, Dialect, Disturb, PORT, World};
use super::guest::pattern_page;

/// Connections served at once; each has a thread.
const MAX_CONNECTIONS: usize = 64;
const PAGE: u64 = 4096;
/// Longest `/proc/iomem` that is read.
const MAX_IOMEM: u64 = 1 << 20;

struct Options {
    listen: SocketAddr,
    dialect: Dialect,
    pattern_mib: usize,
}

fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Options, String> {
    let mut options = Options {
        listen: SocketAddr::from(([0, 0, 0, 0], PORT)),
        dialect: Dialect::default(),
        pattern_mib: 1,
    };
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let flag = word.to_string_lossy().into_owned();
        let value = words
            .next()
            .ok_or_else(|| format!("{flag}: a value is required"))?;
        let value = value.to_string_lossy();
        let unfit = || format!("{flag} {value}: cannot be");
        match flag.as_str() {
            "--listen" => options.listen = value.parse().map_err(|_| unfit())?,
            "--dialect" => options.dialect = value.parse()?,
            "--pattern-mib" => options.pattern_mib = value.parse().map_err(|_| unfit())?,
            _ => return Err(format!("unexpected argument '{flag}' found")),
        }
    }
    Ok(options)
}

/// Serves until it is killed.
pub(super) fn main(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match parse(words) {
        Ok(options) => options,
        Err(error) => {
            super::complain(&format!("error: guest-agent: {error}"));
            return ExitCode::from(2);
        }
    };
    match serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            super::complain(&format!(
                "Error: guest-agent on {}: {error}",
                options.listen
            ));
            ExitCode::FAILURE
        }
    }
}

/// What all connections share.
struct Shared {
    agent: Agent,
    machine: Machine,
    connections: usize,
}

struct Office {
    shared: Mutex<Shared>,
    /// A request was answered: there may be work.
    answered: Condvar,
}

impl Office {
    /// A thread that panicked leaves nothing half done that matters here.
    fn enter(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serve(options: &Options) -> io::Result<()> {
    let listener = TcpListener::bind(options.listen)?;
    println!(
        "rewake-sim guest-agent (stand-in for envd) listens on {}",
        listener.local_addr()?
    );
    let office = Arc::new(Office {
        shared: Mutex::new(Shared {
            agent: Agent::new(options.dialect),
            machine: Machine::new(options.pattern_mib),
            connections: 0,
        }),
        answered: Condvar::new(),
    });
    let background = Arc::clone(&office);
    thread::spawn(move || work(&background));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let mut held = office.enter();
        if held.connections >= MAX_CONNECTIONS {
            continue;
        }
        held.connections += 1;
        drop(held);
        let office = Arc::clone(&office);
        thread::spawn(move || {
            // The peer is free to leave in the middle of anything.
            let _left = converse(stream, &office);
            office.enter().connections -= 1;
        });
    }
}

/// Ticks, and walks through memory while a preload runs.
fn work(office: &Office) {
    let mut held = office.enter();
    loop {
        let Shared { agent, machine, .. } = &mut *held;
        machine.counter += 1;
        let wake = agent.advance(machine, Disturb::default(), Instant::now());
        let pause = match wake {
            Some(at) => at.saturating_duration_since(Instant::now()),
            None => Duration::from_millis(50),
        };
        let waited = office.answered.wait_timeout(held, pause);
        held = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

fn converse(mut stream: TcpStream, office: &Office) -> io::Result<()> {
    let mut conversation = Conversation::default();
    let mut buffer = [0; 4096];
    stream.set_nodelay(true)?;
    while !conversation.closing {
        let read = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let mut held = office.enter();
        let Shared { agent, machine, .. } = &mut *held;
        machine.counter += 1;
        let answer = conversation.feed(&buffer[..read], agent, machine);
        drop(held);
        office.answered.notify_one();
        stream.write_all(&answer)?;
    }
    Ok(())
}

/// The Linux machine around this process.
struct Machine {
    nonce: u128,
    counter: u64,
    pattern: Vec<[u8; PAGE as usize]>,
    /// System RAM as `/proc/iomem` lists it: address and bytes.
    regions: Vec<(u64, u64)>,
    kcore: Option<Kcore>,
}

impl Machine {
    fn new(pattern_mib: usize) -> Self {
        let nonce = uuid::Uuid::new_v4().as_u128();
        let pages = (pattern_mib << 20) as u64 / PAGE;
        Self {
            nonce,
            counter: 0,
            pattern: (0..pages).map(|index| pattern_page(nonce, index)).collect(),
            regions: system_ram().unwrap_or_default(),
            kcore: Kcore::open().ok(),
        }
    }
}

impl World for Machine {
    fn unix_ns(&self) -> i64 {
        i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
    }

    fn set_unix_ns(&mut self, ns: i64) {
        let time = rustix::time::Timespec {
            tv_sec: ns.div_euclid(1_000_000_000),
            tv_nsec: ns.rem_euclid(1_000_000_000) as _,
        };
        // Not root: the clock stays, as in the real agent.
        let _refused = rustix::time::clock_settime(rustix::time::ClockId::Realtime, time);
    }

    fn ram_pages(&self) -> u64 {
        self.regions.iter().map(|(_, len)| len / PAGE).sum()
    }

    fn ram_regions(&self) -> u64 {
        self.regions.len() as u64
    }

    fn touch(&mut self, first: u64, count: u64) -> Result<(), String> {
        let Some(kcore) = &self.kcore else {
            return Err("/proc/kcore: cannot be read".to_owned());
        };
        let mut skip = first;
        let mut left = count;
        for (start, len) in &self.regions {
            let pages = len / PAGE;
            if skip >= pages {
                skip -= pages;
                continue;
            }
            let take = left.min(pages - skip);
            for page in skip..skip + take {
                // Pages that cannot be read are tolerated, as in the real agent.
                let _tolerated = kcore.touch(start + page * PAGE);
            }
            left -= take;
            skip = 0;
            if left == 0 {
                break;
            }
        }
        Ok(())
    }

    fn state(&mut self) -> Value {
        let wrong = |(index, page): &(usize, &[u8; PAGE as usize])| {
            **page != pattern_page(self.nonce, *index as u64)
        };
        let bad = self.pattern.iter().enumerate().filter(wrong).count();
        json!({
            "stand_in": "rewake-sim guest-agent: not envd",
            "nonce": format!("{:032x}", self.nonce),
            "counter": self.counter,
            "pattern_pages": self.pattern.len(),
            "bad_pages": bad,
            "ram_bytes": self.ram_pages() * PAGE,
        })
    }
}

/// `System RAM` of `/proc/iomem`. Its addresses are zero for those who may not see them.
fn system_ram() -> io::Result<Vec<(u64, u64)>> {
    let mut text = String::new();
    File::open("/proc/iomem")?
        .take(MAX_IOMEM)
        .read_to_string(&mut text)?;
    Ok(parse_iomem(&text))
}

fn parse_iomem(text: &str) -> Vec<(u64, u64)> {
    let mut regions = Vec::new();
    // Nested entries are indented and lie inside one that is not.
    for line in text.lines().filter(|line| !line.starts_with(' ')) {
        let Some((range, "System RAM")) = line.split_once(" : ") else {
            continue;
        };
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let hex = |text| u64::from_str_radix(text, 16);
        if let (Ok(start), Ok(end)) = (hex(start), hex(end))
            && end > start
        {
            regions.push((start, end - start + 1));
        }
    }
    regions
}

/// Physical memory through `/proc/kcore`: an ELF core file (`fs/proc/kcore.c`).
struct Kcore {
    file: File,
    /// Physical address, bytes, offset in the file.
    segments: Vec<(u64, u64, u64)>,
}

impl Kcore {
    fn open() -> io::Result<Self> {
        let file = File::open("/proc/kcore")?;
        let mut header = [0; 64];
        file.read_exact_at(&mut header, 0)?;
        let word =
            |bytes: &[u8], at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
        if &header[..5] != b"\x7fELF\x02" {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let table = word(&header, 32);
        let count = u16::from_le_bytes([header[56], header[57]]);
        let mut segments = Vec::new();
        for index in 0..u64::from(count) {
            let mut entry = [0; 56];
            file.read_exact_at(&mut entry, table + index * 56)?;
            let physical = word(&entry, 24);
            // Only PT_LOAD with a physical address is RAM; others are vmalloc, modules, text.
            if entry[0] == 1 && physical != u64::MAX {
                segments.push((physical, word(&entry, 32), word(&entry, 8)));
            }
        }
        Ok(Self { file, segments })
    }

    fn touch(&self, physical: u64) -> io::Result<()> {
        let holds = |s: &&(u64, u64, u64)| physical >= s.0 && physical - s.0 < s.1;
        let Some((start, _, offset)) = self.segments.iter().find(holds) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        self.file
            .read_exact_at(&mut [0], offset + (physical - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_system_ram_at_the_top_level_only() {
        let text = "00000000-00000fff : Reserved\n00001000-0009fbff : System RAM\n00100000-bfffffff : System RAM\n  01000000-01ffffff : Kernel code\n  02000000-02ffffff : System RAM\n100000000-13fffffff : System RAM\n";
        let wanted = [
            (0x1000, 0x9ec00),
            (0x10_0000, 0xbff0_0000),
            (0x1_0000_0000, 0x4000_0000),
        ];
        assert_eq!(parse_iomem(text), wanted);
        assert_eq!(parse_iomem("00000000-00000000 : System RAM\n"), []);
    }
}
