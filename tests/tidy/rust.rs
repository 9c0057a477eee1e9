//! A minimal parser for Rust: separates code from comments and literals, and finds words and the ends of items.

pub fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The word at the start of `text`; empty if there is none.
pub fn word(text: &str) -> String {
    text.chars().take_while(|c| is_word(*c)).collect()
}

/// The positions of `word` in `text` as a whole word.
pub fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let ends = word.ends_with('!') || !text[at + word.len()..].starts_with(is_word);
        ends && !text[..*at].ends_with(is_word)
    })
}

/// The number of the line (from 1) that contains the byte at `at`.
pub fn line(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

pub fn code_lines(code: &str) -> usize {
    code.lines().filter(|line| !line.trim().is_empty()).count()
}

/// The end of the item that starts at `from`: after its closing brace or its semicolon.
pub fn item_end(code: &str, from: usize) -> Option<usize> {
    let mut braces = 0usize;
    let mut others = 0usize;
    for (i, c) in code[from..].char_indices() {
        match c {
            '(' | '[' => others += 1,
            ')' | ']' => others = others.saturating_sub(1),
            '{' => braces += 1,
            '}' if braces <= 1 => return Some(from + i + 1),
            '}' => braces -= 1,
            ';' if braces == 0 && others == 0 => return Some(from + i + 1),
            _ => {}
        }
    }
    None
}

/// `code` with all items under `#[cfg(test)]` blanked.
pub fn without_tests(code: &str) -> String {
    let marker = "#[cfg(test)]";
    let mut rest = code.to_string();
    while let Some(at) = rest.find(marker) {
        let end = marked_end(&rest, at + marker.len());
        let blank: String = rest[at..end].chars().map(|c| if c == '\n' { c } else { ' ' }).collect();
        rest.replace_range(at..end, &blank);
    }
    rest
}

/// The end of the syntax that an attribute ending at `from` applies to: an item, a statement, or a field, which ends
/// with its comma or before the closing brace of all fields.
fn marked_end(code: &str, from: usize) -> usize {
    let end = item_end(code, from).unwrap_or(code.len());
    let mut open = 0usize;
    let mut before = ' ';
    for (i, c) in code[from..end].char_indices() {
        match c {
            '(' | '[' | '{' | '<' => open += 1,
            '}' if open == 0 => return from + i,
            '>' if before == '-' || before == '=' => {}
            ')' | ']' | '}' | '>' => open = open.saturating_sub(1),
            ',' if open == 0 => return from + i + 1,
            _ => {}
        }
        before = c;
    }
    end
}

/// `text` with comments and literals blanked. The code keeps its byte positions.
pub fn mask(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut masked = String::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let skipped = skipped_bytes(bytes, at);
        masked.extend(bytes[at..at + skipped].iter().map(|byte| if *byte == b'\n' { '\n' } else { ' ' }));
        at += skipped;
        if skipped == 0 {
            masked.push(if bytes[at].is_ascii() { char::from(bytes[at]) } else { ' ' });
            at += 1;
        }
    }
    masked
}

/// The length of the comment or literal at `at`; 0 if there is none.
fn skipped_bytes(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    match rest {
        [b'/', b'/', ..] => rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => block_comment(rest),
        [b'r', b'#' | b'"', ..] => {
            let before = if at == 0 { ' ' } else { char::from(bytes[at - 1]) };
            if is_word(before) && !matches!(before, 'b' | 'c') { 0 } else { raw_string(rest) }
        }
        [b'"', ..] => quoted(rest, b'"'),
        [b'\'', b'\\', ..] => quoted(rest, b'\''),
        // A quote starts a lifetime, unless one character (of `width` bytes in UTF-8) and a quote follow.
        [b'\'', first, ..] => {
            let width = match first.leading_ones() {
                0 => 1,
                2 => 2,
                3 => 3,
                _ => 4,
            };
            if rest.get(1 + width) == Some(&b'\'') { width + 2 } else { 0 }
        }
        _ => 0,
    }
}

fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != quote {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

fn raw_string(rest: &[u8]) -> usize {
    let hashes = rest[1..].iter().take_while(|b| **b == b'#').count();
    // `r#name` is a raw identifier.
    if rest.get(1 + hashes) != Some(&b'"') {
        return 0;
    }
    let close: Vec<u8> = [b'"'].into_iter().chain(vec![b'#'; hashes]).collect();
    let inside = &rest[hashes + 2..];
    let end = inside.windows(close.len()).position(|window| window == close);
    end.map_or(rest.len(), |end| hashes + 2 + end + close.len())
}

fn block_comment(rest: &[u8]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at.min(rest.len())
}

#[test]
fn masking_leaves_only_code() {
    let text = "a // fn b\n/* x /* y */ { */ c \"}\\\"{\" r#\"\"}\"# '{' '\\'' b'}' &'a d '\u{e9}' e\n\"\n\"";
    let masked = mask(text);
    assert_eq!(masked.split_whitespace().collect::<Vec<_>>(), ["a", "c", "b", "&'a", "d", "e"]);
    assert_eq!((masked.len(), masked.matches('\n').count()), (text.len(), text.matches('\n').count()));
}

#[test]
fn only_test_code_is_left_out() {
    let code = "use a;\n#[cfg(test)]\n#[allow(b)]\nmod tests {\n    fn f() {}\n}\nfn g() {}\n\
                #[cfg(test)]\nmod far;\nmod near;";
    assert_eq!(without_tests(code).split_whitespace().collect::<Vec<_>>().join(" "), "use a; fn g() {} mod near;");
    let fields = "fn f() { A { #[cfg(test)] a: B::<C, D>::new(1, 2), c, #[cfg(test)] b: 2 } } fn g() {}";
    let left = without_tests(fields).split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(left, "fn f() { A { c, } } fn g() {}");
    let generic = "#[cfg(test)]\nimpl<A, B> Fn for C<A, B> { fn f() -> A {} }\nfn g() {}";
    assert_eq!(without_tests(generic).trim(), "fn g() {}");
}
