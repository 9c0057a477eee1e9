//! The page table: finds a page by its number, and hands out slots.
//!
//! The index is a table of chains through the pages, as UVM's was. A table with open addressing fills up with
//! tombstones and is rehashed all at once, which takes 50 ms for a cache of 4 GiB. This one grows by a row at a time
//! (linear hashing: Litwin, "Linear hashing: a new tool for file and table addressing", VLDB 1980): a new row takes
//! over the pages that belong to it from one other row, so the cache can grow while it is used.

use std::ops::{Index, IndexMut};

use crate::units::{PageId, PageNo, PageSpan, low_u32};

use super::super::growing::vec_for;
use super::page::{NONE, Page};

/// The page number of a free slot: no image has such a page.
const NOWHERE: PageNo = PageNo((1 << 48) - 1);
/// Adjacent pages whose chains begin in parallel, because adjacent pages are looked up, inserted and removed together.
const ROW_PAGES: usize = 8;
/// Pages of a block, for [`PageTable::blocks`]: 16 MiB.
const BLOCK_PAGES: u64 = 4096;
/// 2^64 divided by the golden ratio (Fibonacci hashing: Knuth, The Art of Computer Programming, volume 3, section 6.4).
const FIBONACCI: u64 = 0x9e37_79b9_7f4a_7c15;

/// All pages in memory, by number. It has at least as many slots as the cache has frames, so inserting never allocates.
///
/// => The slot that was freed first is taken first. Adjacent pages are mostly inserted and removed together, so their
///    slots are adjacent too, unless another page is inserted between them.
#[derive(Debug)]
pub(super) struct PageTable {
    slots: Vec<Page>,
    /// The next free slot to be taken and the last one, chained by [`Page::waiters`]; [`NONE`] if no slot is free.
    free_head: u32,
    free_tail: u32,
    resident: u32,
    index: Vec<Row>,
    /// Rows that the index started with.
    first_rows: usize,
    /// A row `r` of those was split into the rows `r + n * first_rows`, with `n` up to this number (2^k - 1), as far as
    /// they exist.
    split_mask: usize,
    /// Number of pages in the table, by the hash of their block. A range operation skips blocks without pages: most of
    /// the ranges that guests discard are not in memory.
    blocks: Vec<u32>,
    /// Random, so that a guest cannot choose pages whose chains are the same.
    key: u64,
}

/// The first page of each of eight chains, or [`NONE`]; one row lies within one cache line.
#[derive(Clone, Debug)]
#[repr(align(32))]
struct Row([u32; ROW_PAGES]);

/// Rows of the index for this many pages: 1.5 chains for each page, which keeps the chains short.
fn rows_for(pages: usize) -> usize {
    (pages * 3 / 2).div_ceil(ROW_PAGES)
}

impl PageTable {
    /// A table for at most `pages` pages, later for at most `pages_max`; `key` is random.
    pub fn new(pages: u32, pages_max: u32, key: u64) -> Self {
        let mut slots: Vec<Page> = vec_for(pages_max);
        slots.resize(pages as usize, Page::new(NOWHERE));
        for (next, slot) in (1..).zip(&mut slots) {
            slot.replace_waiters(if next == pages { NONE } else { next });
        }
        let first_rows = rows_for(pages as usize);
        let mut index: Vec<Row> = vec_for(low_u32(rows_for(pages_max as usize) as u64));
        index.resize(first_rows, Row([NONE; ROW_PAGES]));
        Self {
            slots,
            free_head: 0,
            free_tail: pages - 1,
            resident: 0,
            index,
            first_rows,
            split_mask: 0,
            // Four times as many as the blocks that the pages fill, so that few blocks share a counter.
            blocks: vec![0; (pages_max as usize / 1024).next_power_of_two().max(64)],
            key,
        }
    }

    /// Adds slots up to `pages`.
    pub fn grow(&mut self, pages: u32) {
        for id in self.capacity()..pages {
            self.slots.push(Page::new(NOWHERE));
            self.append_free(id);
        }
        while self.index.len() < rows_for(self.slots.len()) {
            self.add_row();
        }
    }

    /// Adds a row to the index, and moves to it the pages that belong to it from the row that stood for both.
    fn add_row(&mut self) {
        let new = self.index.len();
        let (part, of_first) = (new / self.first_rows, new % self.first_rows);
        self.split_mask = (part + 1).next_power_of_two() - 1;
        let old = of_first + (part & self.split_mask >> 1) * self.first_rows;
        self.index.push(Row([NONE; ROW_PAGES]));
        for in_row in 0..ROW_PAGES {
            let mut id = std::mem::replace(&mut self.index[old].0[in_row], NONE);
            let mut last = [NONE; 2];
            // The order within a chain is kept: old pages are at its start.
            while id != NONE {
                let next = std::mem::replace(&mut self.slots[id as usize].next, NONE);
                let (row, place) = self.place(self.slots[id as usize].no());
                debug_assert!(place == in_row && (row == old || row == new), "a page is in the chain of its place");
                let last = &mut last[usize::from(row == new)];
                match std::mem::replace(last, id) {
                    NONE => self.index[row].0[in_row] = id,
                    before => self.slots[before as usize].next = id,
                }
                id = next;
            }
        }
    }

    /// Adds a slot to the end of the free ones.
    fn append_free(&mut self, id: u32) {
        match self.free_tail {
            NONE => self.free_head = id,
            tail => {
                self.slots[tail as usize].replace_waiters(id);
            }
        }
        self.free_tail = id;
    }

    /// The counter of a page's block.
    fn block_index(&self, no: PageNo) -> usize {
        let mixed = ((no.0 / BLOCK_PAGES) ^ self.key).wrapping_mul(FIBONACCI) >> 32;
        low_u32(mixed) as usize & (self.blocks.len() - 1)
    }

    /// The pages of a span that are in the table, in no order. Looks up each page of the blocks that have pages in
    /// memory, or walks the table, whichever is shorter: it takes at most twice the steps of a walk, however long the
    /// span is.
    pub fn within(&self, span: PageSpan) -> Vec<PageId> {
        let mut found = Vec::new();
        if self.resident == 0 {
            return found;
        }
        let walk = || self.iter().filter(|(_, page)| span.contains(page.no())).map(|(id, _)| id).collect();
        if span.count / BLOCK_PAGES > self.slots.len() as u64 {
            return walk();
        }
        let end = span.first.0 + span.count;
        let block_of = |at: u64| at..((at / BLOCK_PAGES + 1) * BLOCK_PAGES).min(end);
        let blocks =
            std::iter::successors(Some(block_of(span.first.0)), |block| (block.end < end).then(|| block_of(block.end)));
        let occupied = blocks.filter(|block| self.blocks[self.block_index(PageNo(block.start))] > 0);
        let mut looked_up = 0;
        for block in occupied {
            looked_up += block.end - block.start;
            if looked_up > self.slots.len() as u64 {
                return walk();
            }
            found.extend(block.filter_map(|no| self.find(PageNo(no))));
        }
        found
    }

    /// The start of the page's chain, as (row, position in it). The upper bits of a multiplicative hash, which are well
    /// mixed, select the row of eight adjacent pages, and the page's number selects the position. Lower bits select
    /// among the rows that this row was split into; a row that does not exist yet is still part of another one.
    ///
    /// => Without the key the pages of a chain differ by multiples of known numbers. With it, pages chosen to collide
    ///    are spread like any others, and adjacent rows are still spread evenly.
    fn place(&self, no: PageNo) -> (usize, usize) {
        let row = no.0 / ROW_PAGES as u64;
        let mixed = (row ^ row >> 32 ^ self.key).wrapping_mul(FIBONACCI) >> 32;
        // The hash shifts the position too: otherwise a guest that uses every eighth page would fill only one position
        // of each row.
        let in_row = (no.0 ^ mixed) % ROW_PAGES as u64;
        let first = low_u32((mixed * self.first_rows as u64) >> 32) as usize;
        let part = low_u32(mixed / ROW_PAGES as u64) as usize & self.split_mask;
        let row = first + part * self.first_rows;
        let row = if row < self.index.len() { row } else { first + (part & self.split_mask >> 1) * self.first_rows };
        (row, low_u32(in_row) as usize)
    }

    /// The first page of the chain at a place, or [`NONE`].
    fn first(&self, (row, in_row): (usize, usize)) -> u32 {
        self.index[row].0[in_row]
    }

    fn set_first(&mut self, (row, in_row): (usize, usize), id: u32) {
        self.index[row].0[in_row] = id;
    }

    /// The rest of a chain, from page `id` on.
    fn chain(&self, mut id: u32) -> impl Iterator<Item = (PageId, &Page)> {
        std::iter::from_fn(move || {
            let page = self.slots.get(id as usize)?;
            Some((PageId(std::mem::replace(&mut id, page.next)), page))
        })
    }

    /// The page with this number, if it is in memory.
    pub fn find(&self, no: PageNo) -> Option<PageId> {
        self.find_in_chain(self.chain_start(no), no)
    }

    /// The first page of the chain that page `no` belongs to, or [`PageId::NONE`]: the first step of
    /// [`PageTable::find`].
    pub fn chain_start(&self, no: PageNo) -> PageId {
        PageId(self.first(self.place(no)))
    }

    /// Prefetches what the last step of [`PageTable::find`] reads, if the page is the first of its chain, as most are.
    pub fn prefetch_slot(&self, start: PageId) {
        // For an empty chain, read any slot: a branch would wait for the read of the index.
        let page = &self.slots[start.index().min(self.slots.len() - 1)];
        std::hint::black_box((page.no(), page.next));
    }

    /// The last step of [`PageTable::find`].
    pub fn find_in_chain(&self, start: PageId, no: PageNo) -> Option<PageId> {
        self.chain(start.0).find(|(_, page)| page.no() == no).map(|(id, _)| id)
    }

    /// Like [`PageTable::find`]. Much faster if the page is in the slot `guess`.
    pub fn find_near(&self, guess: PageId, no: PageNo) -> Option<PageId> {
        let is_there = self.slots.get(guess.index()).is_some_and(|page| page.no() == no);
        if is_there { Some(guess) } else { self.find(no) }
    }

    /// Whether the slot holds a page. In a free slot [`Page::waiters`] is not a waiter.
    pub fn is_resident(&self, id: PageId) -> bool {
        self.slots[id.index()].no() != NOWHERE
    }

    /// Takes a slot for a page that is not in the table; `None` if no slot is free.
    pub fn insert(&mut self, no: PageNo) -> Option<PageId> {
        debug_assert!(self.find(no).is_none(), "{no:?} is in the table already");
        if self.free_head == NONE {
            return None;
        }
        let id = self.free_head;
        let slot = &mut self.slots[id as usize];
        self.free_head = slot.waiters();
        if self.free_head == NONE {
            self.free_tail = NONE;
        }
        *slot = Page::new(no);
        let place = self.place(no);
        // At the end of the chain, which the preceding lookup has just walked. So old pages, which are the next to be
        // evicted, are at its start.
        match self.chain(self.first(place)).last() {
            Some((last, _)) => self.slots[last.index()].next = id,
            None => self.set_first(place, id),
        }
        self.resident += 1;
        let block = self.block_index(no);
        self.blocks[block] += 1;
        Some(PageId(id))
    }

    /// Removes a page from the table, and returns its last state.
    pub fn remove(&mut self, id: PageId) -> Page {
        let page = std::mem::replace(&mut self.slots[id.index()], Page::new(NOWHERE));
        let place = self.place(page.no());
        let before = self.chain(self.first(place)).find(|(_, before)| before.next == id.0).map(|(before, _)| before);
        match before {
            Some(before) => self.slots[before.index()].next = page.next,
            None => self.set_first(place, page.next),
        }
        self.append_free(id.0);
        self.resident -= 1;
        let block = self.block_index(page.no());
        self.blocks[block] -= 1;
        page
    }

    /// Number of slots.
    pub fn capacity(&self) -> u32 {
        low_u32(self.slots.len() as u64)
    }

    /// Number of pages in the table.
    pub fn len(&self) -> u32 {
        self.resident
    }

    /// The pages in the table, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (PageId, &Page)> {
        (0..).map(PageId).zip(&self.slots).filter(|(_, page)| page.no() != NOWHERE)
    }

    /// Bytes of memory that the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.slots.len() * size_of::<Page>()
            + self.index.len() * size_of::<Row>()
            + self.blocks.len() * size_of::<u32>()
    }
}

impl Index<PageId> for PageTable {
    type Output = Page;
    fn index(&self, id: PageId) -> &Page {
        &self.slots[id.index()]
    }
}

impl IndexMut<PageId> for PageTable {
    fn index_mut(&mut self, id: PageId) -> &mut Page {
        &mut self.slots[id.index()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_heads_of_eight_adjacent_pages_share_a_row() {
        let table = PageTable::new(1000, 1000, 0);
        for first in (0..1000).map(|n: u64| n * n * 8) {
            let (rows, mut places): (Vec<usize>, Vec<usize>) =
                (first..first + 8).map(|no| table.place(PageNo(no))).unzip();
            places.sort_unstable();
            assert_eq!((rows, places), (vec![table.place(PageNo(first)).0; 8], (0..8).collect()));
        }
    }

    #[test]
    fn a_lookup_by_span_finds_exactly_its_resident_pages() {
        let mut table = PageTable::new(1000, 1000, 0);
        let resident = [0, 1, 4095, 4096, 5000, 8191, 8192, 1 << 20, (1 << 20) + 77, 1 << 40];
        let ids = resident.map(|no| table.insert(PageNo(no)).expect("a slot is free"));
        let removed = table.insert(PageNo(6000)).expect("a slot is free");
        table.remove(removed);
        for first in resident.into_iter().flat_map(|no| [no.saturating_sub(1), no, no + 1]) {
            for count in [1, 2, 100, 4095, 4096, 4097, 10_000, 1 << 21] {
                let span = PageSpan { first: PageNo(first), count };
                let mut found = table.within(span);
                found.sort_unstable_by_key(|id| id.0);
                let expected = resident.iter().zip(ids).filter(|(no, _)| span.contains(PageNo(**no)));
                assert_eq!(found, expected.map(|(_, id)| id).collect::<Vec<_>>(), "{count} pages from {first}");
            }
        }
        for id in ids {
            table.remove(id);
        }
        assert!(table.blocks.iter().all(|&count| count == 0), "each page is counted once");
    }

    #[test]
    fn chains_stay_short_after_many_inserts_and_removes() {
        const PAGES: u64 = 10_000;
        const KEY: u64 = 0x0123_4567_89ab_cdef;
        let spread: [fn(u64) -> u64; 4] =
            [|n| n, |n| n * 8, |n| n << 18, |n| n.wrapping_mul(0x5851_f42d_4c95_7f2d) >> 24];
        for number in spread {
            let mut table = PageTable::new(low_u32(PAGES), low_u32(PAGES), KEY);
            for n in 0..4 * PAGES {
                if n >= PAGES {
                    table.remove(table.find(PageNo(number(n - PAGES))).expect("it was inserted before"));
                }
                table.insert(PageNo(number(n))).expect("a slot is free");
            }
            let steps = steps_to_all(&table, (3 * PAGES..4 * PAGES).map(number));
            assert!(steps < 2 * PAGES, "{steps} steps for {PAGES} pages");
            assert_eq!(table.iter().count() as u64, PAGES);
        }
    }

    /// Total steps of the searches for these pages.
    fn steps_to_all(table: &PageTable, pages: impl Iterator<Item = u64>) -> u64 {
        let steps_to = |no: PageNo| {
            let mut chain = table.chain(table.first(table.place(no)));
            1 + chain.position(|(_, page)| page.no() == no).expect("the page is in the table") as u64
        };
        pages.map(|no| steps_to(PageNo(no))).sum()
    }

    #[test]
    fn a_growing_table_finds_every_page_through_short_chains() {
        const PAGES: u64 = 5000;
        const KEY: u64 = 0x0123_4567_89ab_cdef;
        let spread: [fn(u64) -> u64; 4] =
            [|n| n, |n| n * 8, |n| n << 18, |n| n.wrapping_mul(0x5851_f42d_4c95_7f2d) >> 24];
        for number in spread {
            let mut table = PageTable::new(16, low_u32(PAGES), KEY);
            let memory = table.slots.as_ptr();
            for n in 0..PAGES {
                if table.len() == table.capacity() {
                    table.grow(low_u32(PAGES).min(table.capacity() + 1 + low_u32(n) % 37));
                    assert!((0..n).all(|n| table.find(PageNo(number(n))).is_some()), "after {n} pages");
                }
                table.insert(PageNo(number(n))).expect("a slot is free");
            }
            assert_eq!(table.slots.as_ptr(), memory, "its addresses were reserved");
            let grown = steps_to_all(&table, (0..PAGES).map(number));
            assert!(grown < PAGES * 7 / 4, "{grown} steps for {PAGES} pages");
            assert_eq!(table.index.len(), PageTable::new(table.capacity(), table.capacity(), KEY).index.len());
            for n in (0..PAGES).rev() {
                table.remove(table.find(PageNo(number(n))).expect("it was inserted before"));
            }
            assert!(table.index.iter().all(|row| row.0 == [NONE; ROW_PAGES]), "no page is in two chains");
        }
    }

    #[test]
    fn the_hash_key_spreads_pages_that_were_chosen_to_collide() {
        const PAGES: u32 = 1000;
        let known = PageTable::new(1 << 16, 1 << 16, 0);
        let first = known.place(PageNo(0));
        let chosen: Vec<u64> =
            (0..).map(|row| row * 8).filter(|&no| known.place(PageNo(no)).0 == first.0).take(PAGES as usize).collect();
        for key in [0x5bd1_e995_7b93_a1c7, 0x1234_5678_9abc_def1, u64::MAX / 3, 1 << 40 | 12345] {
            let keyed = PageTable::new(1 << 16, 1 << 16, key);
            let mut rows: Vec<usize> = chosen.iter().map(|&no| keyed.place(PageNo(no)).0).collect();
            rows.sort_unstable();
            let longest = rows.chunk_by(|one, other| one == other).map(<[usize]>::len).max();
            assert!(longest < Some(PAGES as usize / 20), "{longest:?} of {PAGES} in a row of the index, with {key:#x}");
        }
    }

    #[test]
    fn the_slot_of_a_removed_page_is_reused() {
        let mut table = PageTable::new(3, 3, 7);
        let far = PageNo(1 << 40);
        let ids: Vec<_> = [PageNo(0), PageNo(7), far].into_iter().map(|no| table.insert(no).unwrap()).collect();
        assert_eq!(table.insert(PageNo(9)), None, "no slot is free");
        assert_eq!(table.find(far), Some(ids[2]));
        assert_eq!(table[ids[2]].no(), far);
        assert_eq!(table.remove(ids[1]).no(), PageNo(7));
        assert_eq!(table.find(PageNo(7)), None);
        assert!(!table.is_resident(ids[1]));
        assert_eq!(table.insert(PageNo(9)), Some(ids[1]));
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn a_page_is_found_whatever_slot_is_guessed() {
        let mut table = PageTable::new(8, 8, 0);
        let ids: Vec<PageId> = [4, 5, 6, 9].into_iter().map(|no| table.insert(PageNo(no)).unwrap()).collect();
        assert_eq!(table.find_near(ids[1], PageNo(5)), Some(ids[1]), "the guess is right");
        assert_eq!(table.find_near(ids[3], PageNo(5)), Some(ids[1]), "the page is elsewhere");
        assert_eq!(table.find_near(PageId::NONE, PageNo(5)), Some(ids[1]), "there is no guess");
        assert_eq!(table.find_near(ids[3], PageNo(7)), None, "the slot has another page");
        table.remove(ids[1]);
        assert_eq!(table.find_near(ids[1], PageNo(5)), None, "removed");
        assert_eq!(table.find_near(PageId(8), PageNo(4)), Some(ids[0]), "there is no such slot");
        // Slots are taken in the order in which they became free.
        table.remove(ids[0]);
        let taken: Vec<u32> = (20..26).map(|no| table.insert(PageNo(no)).unwrap().0).collect();
        assert_eq!(taken, [4, 5, 6, 7, 1, 0]);
        assert_eq!(table.insert(PageNo(30)), None);
    }
}
