//! What the help of a command says after its options; the manual has the same sections. At most 80 columns.

pub(super) const GENBLK: &str = "\
Files:
  A configuration file holds any number of [[device]] tables, and has more keys
  than there are options here: genblk.toml(5), or configs/default.toml in the
  source tree, which has every key with its default and its reason. The files
  beside it are worked examples.

Cache modes:
  writeback     a write completes once it is in the cache; a FLUSH makes it
                durable
  writethrough  a write completes once it is durable on the image
  none          nothing is cached

Tasks:
  see which disks are served, and why one is not   genblk list
  find out which disk is slow, and why             genblk stat, genblk top
  take a consistent snapshot on the host           genblk freeze vm1 -- COMMAND
  change a disk while it is served                 genblk set vm1 KEY=VALUE
  make a disk larger                               genblk resize vm1 40G
  read the configuration file again                genblk reload
  show the configuration that is in force          genblk config
  add a disk from a file                           genblk attach vm3.toml
  write a disk to its image, and remove it         genblk detach vm2
  make all completed writes durable now            genblk flush vm1
  resume after an error of the image               genblk resume vm1
  feed Prometheus                                  genblk exporter
  write back what a crashed daemon left            genblk recover
  check a configuration before it is used          genblk --check --config F

Limitations:
  Images are raw files, block devices and NBD exports (nbd://HOST[:PORT]/EXPORT,
  nbd+unix:///EXPORT?socket=PATH; docs/remote.md says what they promise).
  An image that looks like another format is refused; --format raw serves its
  bytes as they are.
  The front-end must share the guest's memory (QEMU:
  memory-backend-memfd,share=on).
  Relative paths are relative to the daemon's working directory.

Signals:
  SIGTERM, SIGINT  write all dirty data to the images, and exit
  SIGUSR1          exit at once; the caches stay for the next daemon
  SIGHUP           read the configuration again; without a control socket also
                   resume images that were stopped after an error, and retry to
                   serve disks that are not served

Environment:
  GENBLK_LOG  what is logged to standard error: error, warn, info (default),
              debug, trace

Exit status:
  0 after a clean shutdown, 2 if the command line or the configuration is wrong
  (nothing has started then), 1 for every other failure.

Examples:
  genblk --socket-path /run/vm1.sock --blk-file /srv/vm1.img --cache-size 1G
  genblk --check --config /etc/genblk.toml
  genblk --config /etc/genblk.toml
";

pub(super) const LIST: &str = "\
Examples:
  genblk list               every disk: state, front-end, image, sizes
  genblk list vm1 --json    the daemon's reply, for programs
";

pub(super) const STAT: &str = "\
Examples:
  genblk stat               since the start of the daemon
  genblk stat 1             that, and then each second
  genblk stat -y vm1 5 12   vm1 for a minute, in twelve reports
  genblk stat -l vm1        which requests are slow, and whether they waited
  genblk stat -r vm1        how large requests are, and what the image gets
  genblk stat -Hp 1         for programs: tabs, bytes, nanoseconds

Columns:
  r/s w/s f/s    reads, writes and FLUSHes in a second
  hit%           pages found in memory, in percent of those that reads asked
                 for, without holes of the image
  r50 r99        50th and 99th percentile of the time of a read; w50 w99 of a
                 write, f99 of a FLUSH
  dirty          data that is newer than the image
  rd/s wr/s      reads and writes of the image in a second
  busy%          time of the worker threads in turns that found work, in
                 percent of a processor
  from memory    requests that did not wait
  waited         the others: for the image, for room in the cache, or for the
                 limit of dirty data
  used%          pages that were read ahead and then used, in percent
  stall          times that a request waited for room; throttled: that a write
                 met the limit of dirty data
  -              no such request

Why a disk is slow:
  r99 high, hit% low      reads wait for the image: -c shows whether pages are
                          evicted (then more cache helps), and whether what is
                          read ahead is used
  reads waited, hit% high a few misses of a slow image: wr/s and rd/s against
                          what the image can do
  writes waited           throttled (-c) grows: the guest writes faster than the
                          image can be written, and more cache does not help;
                          stall grows: no page of the cache was free
  f99 high                a FLUSH waits for the image to write and to sync: lower
                          flush_target_ms bounds what it has to wait for
  busy% near 100          the worker is the limit: workers = 2, for a guest with
                          several queues
  all low, still slow     the time is lost before genblk: in the guest, or in
                          the front-end
";

pub(super) const TOP: &str = "\
Examples:
  genblk top                redrawn each second; q ends it
  genblk top --once         one screen as text
";

pub(super) const EXPORTER: &str = "\
Examples:
  genblk exporter --listen 127.0.0.1:9950
      serves http://127.0.0.1:9950/metrics
  genblk exporter --once >/var/lib/node_exporter/genblk.prom
      for the textfile directory of node_exporter
  systemctl enable --now genblk-exporter.socket
      the same as a service

Notes:
  A scrape takes the daemon at most 2 s; if it does not reply, the only metric
  is genblk_up 0. Alert rules and a board for Grafana come with the package.
";

pub(super) const RECOVER: &str = "\
Examples:
  genblk recover            lists the caches below /dev/shm
  genblk recover CACHE      writes one to its image, and removes it
  genblk recover --image /srv/new.img CACHE
                            the same, where the image has moved
  genblk recover --discard CACHE
                            deletes one; asks first if it is dirty
  genblk recover --prune    removes those from which nothing would be lost

Notes:
  If the daemon is to run again, start it instead: it restores its caches.
";

pub(super) const TAKE_OVER: &str = "\
Examples:
  genblk take-over /srv/vm1.img

Notes:
  For an image whose cache is lost, is on a host that will not return, or no
  longer matches the image. Completed writes in that cache are lost: a guest that
  was running gets errors until it resets the device.
";

pub(super) const ATTACH: &str = "\
Examples:
  genblk attach vm2.toml
  genblk attach /etc/genblk.toml vm1   after \"genblk detach vm1\" and a change

Notes:
  The file has [[device]] tables, or the keys of one device: name, socket and
  image at least; see genblk.toml(5). Its [control] table is ignored.
  The disk is served until it is detached, or until a clean stop of the daemon. To
  keep it longer, add it to the daemon's configuration.
";

pub(super) const DETACH: &str = "\
Examples:
  genblk detach vm2           shut down its guest first
  genblk detach vm2 --force   the guest loses its disk

Notes:
  All data that the guest has written is on the image afterwards. If the image
  fails, the disk stays attached; with --force it is detached, and its cache stays
  for \"genblk recover\". A volatile cache (survive = \"never\") is written first,
  however long that takes; --discard drops what cannot be written.
";

pub(super) const SET: &str = "\
Examples:
  genblk set vm1 cache.mode=writethrough
  genblk set vm1 poll_us=0 cache.dirty_max_percent=10
  genblk set vm1 limits.total_iops=2000 limits.write_bytes_per_second=50M

Notes:
  All keys change, or none. They take effect at once, and last over a crash and a
  hand-over until a clean stop. To keep them longer, change the configuration.
  Keys that cannot change while a disk is served, such as image, are refused; see
  genblk.toml(5).
";

pub(super) const RELOAD: &str = "\
Examples:
  genblk reload --dry-run   show what would change
  genblk reload

Notes:
  New disks are attached, keys change, and disks that are no longer in the file
  are detached, unless they are in use. If anything in the file is wrong, or a new
  disk cannot be served, nothing changes. SIGHUP does the same; the log has the
  result.
";

pub(super) const CONFIG: &str = "\
Examples:
  genblk config
  genblk config vm1

Notes:
  The output is a valid configuration file, without the [control] table.
";

pub(super) const RESIZE: &str = "\
Examples:
  genblk resize vm1 40G                           the image is a file
  lvextend -L 40G vg0/vm1; genblk resize vm1      it is a block device

Notes:
  The guest sees the new size at once, if its front-end takes messages of the
  back-end (QEMU does). The size is a multiple of 4096 bytes. To make a disk
  smaller, or one at an NBD server larger, detach it and attach it again.
";

pub(super) const EVENTS: &str = "\
Examples:
  genblk events              what the daemon has kept, at most 1024 events
  genblk events -f vm1       that of one disk, and then what comes
  genblk events -f --json    for programs

Notes:
  A line has the time (UTC), the disk, what has happened, and details. Front-ends
  and states are looked at four times a second: what is shorter makes no event.
";

pub(super) const FLUSH: &str = "\
Examples:
  genblk flush vm1

Notes:
  The same as a FLUSH of the guest. Writes that complete meanwhile may or may not
  be durable afterwards.
";

pub(super) const DROP: &str = "\
Examples:
  genblk drop vm1             to measure with a cold cache
  genblk drop vm1 --flushed   dirty pages as well, once they are written
";

pub(super) const RESUME: &str = "\
Examples:
  genblk resume vm1

Notes:
  For an image that works again after an error. With on_error = \"stop\" the guest
  gets errors until then; otherwise genblk retries by itself, and this command
  only saves the wait.
";

pub(super) const FREEZE: &str = "\
Examples:
  genblk freeze vm1 -- lvcreate -s -n vm1-snap -L 2G vg0/vm1
  genblk freeze vm1 -- cp --reflink=always /srv/vm1.img /srv/vm1.copy
  genblk freeze vm1 --timeout 30s && btrfs subvolume snapshot /srv /snap && \\
      genblk thaw vm1

Notes:
  The image then holds what a FLUSH would leave, and does not change until the
  thaw. Writes of the guest wait meanwhile. For a file system that needs no
  replay of its journal, freeze it in the guest first (virsh domfsfreeze).
  A freeze that ends before the command or the thaw is an error: the copy is
  inconsistent. Without a thaw, a freeze ends after its timeout.
";

pub(super) const THAW: &str = "\
Examples:
  genblk thaw vm1

Notes:
  It reports whether the image was unchanged since the freeze. If it was not, a
  copy made meanwhile is inconsistent.
";
