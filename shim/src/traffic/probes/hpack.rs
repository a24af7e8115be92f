//! Headers as HTTP/2 writes them (HPACK, RFC 7541), as far as a probe's go.
//!
//! Only the first header block of a connection is ever read, so nothing is remembered between blocks. What a probe
//! never has is not understood, and so is no probe: references to fields that were sent before, and characters that no
//! text has.

/// A header field: its name and its value.
pub(super) type Field = (Vec<u8>, Vec<u8>);

/// The characters of the Huffman code (RFC 7541, appendix B) by the length of their codes in bits. The code is canonical:
/// codes of one length count up in the order of the characters, and shorter ones come first. Longer ones are those of the
/// backslash, of control characters and of bytes beyond ASCII.
const CODES: [(u32, &[u8]); 10] = [
    (5, b"012aceiost"),
    (6, b" %-./3456789=A_bdfghlmnpru"),
    (7, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, b"&*,;XZ"),
    (10, b"!\"()?"),
    (11, b"'+|"),
    (12, b"#>"),
    (13, b"\0$@[]~"),
    (14, b"^}"),
    (15, b"<`{"),
];
const LONGEST_CODE: u32 = 15;
/// How many bytes may continue a number: enough for a length that fits into a probe.
const MOST_BYTES: u32 = 3;

/// The fields of a connection's first header block; nothing when they are not those of a probe.
pub(super) fn fields(mut block: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while let Some(&first) = block.first() {
        // The first bits tell what follows, the others begin a number.
        match first {
            0x80.. => {
                let (name, value) = predefined(number(&mut block, 7)?)?;
                fields.push((name.into(), value.into()));
            }
            // A new limit of what is remembered, which is nothing here.
            0x20..0x40 => drop(number(&mut block, 5)?),
            // To be remembered or not.
            _ => {
                let name = match number(&mut block, if first < 0x20 { 4 } else { 6 })? {
                    0 => text(&mut block)?,
                    index => predefined(index)?.0.into(),
                };
                fields.push((name, text(&mut block)?));
            }
        }
    }
    Some(fields)
}

/// What the static table (RFC 7541, appendix A) has at `index`; an empty name for what does not matter to a probe.
fn predefined(index: usize) -> Option<(&'static str, &'static str)> {
    Some(match index {
        2 => (":method", "GET"),
        3 => (":method", "POST"),
        4 => (":path", "/"),
        5 => (":path", "/index.html"),
        31 => ("content-type", ""),
        58 => ("user-agent", ""),
        1..=61 => ("", ""),
        _ => return None,
    })
}

/// Takes a number off, which begins with the last `bits` bits of the first byte.
fn number(block: &mut &[u8], bits: u32) -> Option<usize> {
    let most = (1 << bits) - 1;
    let mut value = usize::from(*block.split_off_first()?) & most;
    if value == most {
        for position in 0.. {
            let byte = usize::from(*block.split_off_first()?);
            value += (byte & 0x7f) << (7 * position);
            if byte < 0x80 {
                break;
            }
            if position + 1 == MOST_BYTES {
                return None;
            }
        }
    }
    Some(value)
}

/// Takes a name or a value off.
fn text(block: &mut &[u8]) -> Option<Vec<u8>> {
    let is_coded = *block.first()? >= 0x80;
    let length = number(block, 7)?;
    let bytes = block.split_off(..length)?;
    if is_coded { decode(bytes) } else { Some(bytes.to_vec()) }
}

/// Text in the Huffman code.
fn decode(coded: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    let (mut code, mut length) = (0, 0);
    for byte in coded {
        for position in (0..8).rev() {
            code = code << 1 | usize::from(byte >> position & 1);
            length += 1;
            if let Some(character) = character(code, length) {
                text.push(character);
                (code, length) = (0, 0);
            } else if length == LONGEST_CODE {
                return None;
            }
        }
    }
    // The last byte is filled up with ones.
    (length < 8 && code == (1 << length) - 1).then_some(text)
}

/// The character with this code, which has so many bits.
fn character(code: usize, length: u32) -> Option<u8> {
    let (mut first, mut shorter) = (0, 0);
    for (bits, characters) in CODES {
        first <<= bits - shorter;
        if bits == length {
            return characters.get(code.checked_sub(first)?).copied();
        }
        first += characters.len();
        shorter = bits;
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(|byte| *byte != b' ').collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    fn read(hex: &str) -> Option<Vec<(String, String)>> {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Some(fields(&bytes(hex))?.into_iter().map(|(name, value)| (text(name), text(value))).collect())
    }

    fn one(name: &str, value: &str) -> Vec<(String, String)> {
        vec![(name.to_owned(), value.to_owned())]
    }

    /// RFC 7541, appendix C.
    #[test]
    fn the_examples_of_the_standard_are_read() {
        assert_eq!(
            read("400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572"),
            Some(one("custom-key", "custom-header"))
        );
        assert_eq!(read("040c 2f73 616d 706c 652f 7061 7468"), Some(one(":path", "/sample/path")));
        assert_eq!(read("1008 7061 7373 776f 7264 0673 6563 7265 74"), Some(one("password", "secret")));
        assert_eq!(read("82"), Some(one(":method", "GET")));
        let custom = ("custom-key".to_owned(), "custom-value".to_owned());
        let coded = read("8287 85 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf").unwrap();
        assert_eq!(coded.last(), Some(&custom));
        assert_eq!(coded[2].1, "/index.html");
        let authority = read("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff").unwrap();
        assert_eq!(authority[3], (String::new(), "www.example.com".to_owned()));
        let date = read("6196 d07a be94 1054 d444 a820 0595 040b 8166 e082 a62d 1bff").unwrap();
        assert_eq!(date[0].1, "Mon, 21 Oct 2013 20:13:21 GMT");
        assert_eq!(read(""), Some(Vec::new()));
        assert_eq!(read("20 3fe11f 84"), Some(one(":path", "/")), "limits of the table");
    }

    #[test]
    fn what_a_probe_never_sends_is_not_understood() {
        for (why, hex) in [
            ("no index", "80"),
            ("an index into what was sent before", "be"),
            ("a name that was sent before", "7e 0161"),
            ("a number without an end", "ff"),
            ("a number beyond all bounds", "ff ff ff ff ff 01"),
            ("a text that is cut", "04 05 2f73"),
            ("no text at all", "04"),
            ("a code without an end", "04 81 fe"),
            ("a byte of padding", "04 82 1f ff"),
            ("padding that is none", "04 81 18"),
        ] {
            assert_eq!(read(hex), None, "{why}");
        }
    }

    #[test]
    fn each_character_has_a_code_of_its_own_and_the_rest_of_the_codes_are_longer() {
        let mut seen = std::collections::HashSet::new();
        let mut taken = 0;
        for (bits, characters) in CODES {
            assert!(characters.is_sorted());
            assert!(characters.iter().all(|character| seen.insert(*character)));
            taken += characters.len() << (LONGEST_CODE - bits);
        }
        // 0x7fff0 (19 bits) is the first of the longer ones: that of the backslash.
        assert_eq!(taken, 0x7fff0 >> 4);
        let printable = (b' '..=b'~').filter(|character| !seen.contains(character));
        assert_eq!(printable.collect::<Vec<_>>(), b"\\");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(block: Vec<u8>) {
            let read: usize = fields(&block).into_iter().flatten().map(|(name, value)| name.len() + value.len()).sum();
            // A bit over a character for five bits at best, and a predefined field for a byte.
            prop_assert!(read <= block.len() * ":path/index.html".len());
        }
    }
}
