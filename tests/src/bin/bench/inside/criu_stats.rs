//! What CRIU tells of a dump in `stats-dump`: two magic numbers, the length of a message, and the message, whose first field
//! is the one about dumps (`images/stats.proto` of CRIU).

use std::fs;
use std::path::Path;

use crate::record::Dump;

const NAME: &str = "stats-dump";

/// The numbers with which such a file begins.
const MAGIC: [u32; 2] = [0x5510_5940, 0x5709_3306];

/// Reads the statistics of the dump that has left its files in this folder or below it; nothing when there are none that
/// can be understood.
pub fn of_dump(folder: &Path) -> Option<Dump> {
    let files = super::cache::files(folder).ok()?;
    let path = files.into_iter().find(|path| path.file_name().is_some_and(|name| name == NAME))?;
    parse(&fs::read(path).ok()?)
}

fn parse(bytes: &[u8]) -> Option<Dump> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    if [word(0)?, word(4)?] != MAGIC {
        return None;
    }
    let length = usize::try_from(word(8)?).ok()?;
    let message = bytes.get(12..)?.get(..length)?;
    let (_, dump) = fields(message)?.into_iter().find_map(|(number, value)| match value {
        Value::Bytes(bytes) if number == 1 => Some((number, bytes)),
        _ => None,
    })?;
    let fields = fields(dump)?;
    let number = |wanted: u64| {
        fields.iter().find_map(|(number, value)| match value {
            Value::Number(value) if *number == wanted => Some(*value),
            _ => None,
        })
    };
    Some(Dump { frozen: number(2)?, memory: number(3)?, writing: number(4)? })
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message, numbers and bytes alone; nothing when it has others or is cut off.
fn fields(mut message: &[u8]) -> Option<Vec<(u64, Value<'_>)>> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let value = match key & 7 {
            0 => Value::Number(varint(&mut message)?),
            2 => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                let (bytes, rest) = message.split_at_checked(length)?;
                message = rest;
                Value::Bytes(bytes)
            }
            _ => return None,
        };
        fields.push((key >> 3, value));
    }
    Some(fields)
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for place in 0..10 {
        let (first, rest) = message.split_first()?;
        *message = rest;
        number |= u64::from(first & 0x7f) << (7 * place);
        if first & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Freezing 5, frozen 300, memory 200 and writing 128 µs.
    const MESSAGE: [u8; 13] = [0x0a, 11, 0x08, 5, 0x10, 0xac, 2, 0x18, 0xc8, 1, 0x20, 0x80, 1];

    fn file(message: &[u8]) -> Vec<u8> {
        let mut file: Vec<u8> = MAGIC.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.extend(u32::try_from(message.len()).unwrap_or(u32::MAX).to_le_bytes());
        file.extend(message);
        file
    }

    #[test]
    fn the_times_of_a_dump_are_read() {
        let dump = Dump { frozen: 300, memory: 200, writing: 128 };
        assert_eq!(parse(&file(&MESSAGE)), Some(dump));
    }

    #[test]
    fn what_is_cut_off_or_something_else_is_refused() {
        let whole = file(&MESSAGE);
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length} bytes");
        }
        assert_eq!(parse(&file(&[0x12, 0])), None, "a restore");
        assert_eq!(parse(&file(&[0xff; 20])), None, "no end");
        assert_eq!(of_dump(Path::new("/nonexistent")), None);
    }
}
