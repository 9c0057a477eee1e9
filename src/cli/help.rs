//! The text after the options in the help of a command; the manual has the same sections. At most 80 columns.

pub(super) const GENBLK: &str = "\
Files:
  A configuration file holds any number of [[device]] tables, and offers more
  settings than the options here. genblk.toml(5) lists every key, as does
  configs/default.toml in the source tree, with defaults and reasons. The other
  files in configs/ are worked examples.

Cache modes:
  writeback     a write completes once it is in the cache; a FLUSH makes it
                durable
  writethrough  a write completes once it is durable on the image
  none          nothing is cached

Tasks:
  list the disks, and why one is not served        genblk list
  find out which disk is slow, and why             genblk stat -xy 5 1, genblk top
  take a consistent snapshot on the host           genblk freeze vm1 -- COMMAND
  change a disk while it is served                 genblk set vm1 KEY=VALUE
  make a disk larger (or smaller)                  genblk resize vm1 40G
  apply changes of the configuration file          genblk reload
  show the current configuration                   genblk config
  add a disk from a file                           genblk attach vm3.toml
  write back a disk and stop serving it            genblk detach vm2
  make all completed writes durable now            genblk flush vm1
  resume after an error of the image               genblk resume vm1
  export metrics to Prometheus                     genblk exporter
  write back the cache of a crashed daemon         genblk recover
  check a configuration before it is used          genblk --check --config F

Limitations:
  Images are raw files, block devices and NBD exports (nbd://HOST[:PORT]/EXPORT,
  nbd+unix:///EXPORT?socket=PATH; see remote.md in /usr/share/doc/genblk, or
  docs/ in the source tree). genblk refuses an image that looks like another
  format; --format raw serves its bytes unchanged.
  The front-end must share the guest's memory (QEMU:
  memory-backend-memfd,share=on).
  Relative paths are relative to the daemon's working directory.

Signals:
  SIGTERM, SIGINT  write all dirty data to the images, and exit
  SIGUSR1          exit immediately; the caches stay for the next daemon
  SIGHUP           reload the configuration; without a control socket, also
                   resume images that were stopped after an error, and retry
                   disks that could not be served

Environment:
  GENBLK_LOG  log level on standard error: off, error, warn, info (default),
              debug, trace

Exit status:
  0 after a clean shutdown, 2 if the command line or the configuration is wrong
  (nothing was started), 1 for every other failure.

Examples:
  genblk --socket-path /run/vm1.sock --blk-file /srv/vm1.img --cache-size 1G
  genblk --check --config /etc/genblk.toml
  genblk --config /etc/genblk.toml

A disk for a guest of QEMU:
  /etc/genblk.toml has
      [control]
      socket = \"/run/genblk/control.sock\"
      [[device]]
      name = \"vm1\"
      socket = \"/run/genblk/vm1.sock\"
      image = \"/srv/vm1.img\"
      cache.size = \"1G\"
  The daemon runs (systemctl enable --now genblk), and the guest is started with
      qemu-system-x86_64 -m 4G \\
        -object memory-backend-memfd,id=mem,size=4G,share=on \\
        -machine q35,memory-backend=mem \\
        -chardev socket,id=vm1,path=/run/genblk/vm1.sock,reconnect=1 \\
        -device vhost-user-blk-pci,chardev=vm1
  QEMU of another user needs socket_mode = \"0660\" and a socket_group of which it
  is a member. For libvirt see examples/libvirt-domain.xml in the documentation.
";

pub(super) const LIST: &str = "\
Examples:
  genblk list               every disk: state, front-end, image, sizes
  genblk list vm1 --json    the daemon's reply, for programs
";

pub(super) const STAT: &str = "\
Examples:
  genblk stat               averages since the start of the daemon
  genblk stat 1             the same, then a report each second
  genblk stat -y vm1 5 12   vm1 for a minute, in twelve reports
  genblk stat -xy 5 1       what delays the requests of each disk, in 5 seconds
  genblk stat -l vm1        latencies by kind, and by whether requests waited
  genblk stat -r vm1        sizes of requests, and of operations on the image
  genblk stat -Hp 1         for programs: tabs, bytes, nanoseconds

Columns:
  r/s w/s f/s    reads, writes and FLUSHes per second
  hit%           percentage of the requested pages found in memory; holes of the
                 image are not counted
  r50 r99        50th and 99th percentile of the time of a read; w50 w99 of a
                 write, f99 of a FLUSH
  dirty          data not yet written to the image
  rd/s wr/s      reads and writes of the image per second
  busy%          time that the worker threads spent in turns with work, as a
                 percentage of one processor
  from memory    requests that did not wait
  waited         the others: they waited for the image, for a free page of the
                 cache, or because of the limit on dirty data
  imgr99 imgw99 sync99
                 99th percentile of the time of a read, write and sync of the
                 image
  free behind limited
                 requests per second that waited for a free page (or, before a
                 first write, for space of the image), because write-back was
                 behind, and for a limit of the disk
  used%          percentage of read-ahead pages that were then used
  stall          how often a request waited for a free page, or before a first
                 write for space of the image
  throttled      how often a write waited because of the limit on dirty data
  -              no such request

Why a disk is slow (stat -x and top say it in words):
  r99 high, hit% low      reads wait for the image: -c shows whether pages are
                          evicted (then more cache helps), and whether pages
                          that are read ahead are used
  reads waited, hit% high a few misses on a slow image: compare wr/s and rd/s
                          with the limits of the image
  writes waited           throttled (-c) grows: the guest writes faster than the
                          image can be written, and more cache does not help;
                          stall grows: no page of the cache was free
  f99 high                a FLUSH waits until the image has written and synced:
                          a lower flush_target_ms bounds that work
  busy% near 100          the worker is the limit: set workers = 2, if the guest
                          has several queues
  all low, still slow     the time is lost outside genblk: in the guest, or in
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
  A scrape waits for the daemon for at most 2 s; if it does not reply, the only
  metric is genblk_up 0. The package contains alert rules and a Grafana
  dashboard.
";

pub(super) const RECOVER: &str = "\
Examples:
  genblk recover            lists the caches below /dev/shm
  genblk recover CACHE      writes CACHE to its image, then removes it
  genblk recover --image /srv/new.img CACHE
                            the same for an image that has moved
  genblk recover --discard CACHE
                            deletes CACHE; asks first if it is dirty
  genblk recover --prune    removes all caches that hold no unwritten data

Notes:
  If you want the daemon to run again, just start it: it restores its caches.

Exit status:
  0  done
  1  failed or refused
  2  the command line is wrong
";

pub(super) const TAKE_OVER: &str = "\
Examples:
  genblk take-over /srv/vm1.img

Notes:
  Use this for an image whose cache is lost, is on a host that will not return,
  or no longer matches the image. Completed writes in that cache are lost: a
  guest that was running gets errors until it resets the device.
  Afterwards, start the daemon.

Exit status:
  0  done
  1  failed or refused
  2  the command line is wrong
";

pub(super) const ATTACH: &str = "\
Examples:
  genblk attach vm2.toml      a file with, for example,
                                  name = \"vm2\"
                                  socket = \"/run/genblk/vm2.sock\"
                                  image = \"/srv/vm2.img\"
  genblk attach /etc/genblk.toml vm1   after \"genblk detach vm1\" and a change

Notes:
  The file has [[device]] tables, or the keys of one device: at least name,
  socket and image; see genblk.toml(5). Its [control] table is ignored.
  The disk is served until it is detached, or until the daemon stops cleanly. To
  keep it longer, add it to the daemon's configuration.
";

pub(super) const DETACH: &str = "\
Examples:
  genblk detach vm2           shut down its guest first
  genblk detach vm2 --force   the guest loses its disk

Notes:
  Afterwards the image contains all data that the guest has written. If writes
  to the image fail, the disk stays attached; with --force it is detached, and
  its cache stays for \"genblk recover\". A volatile cache (survive = \"never\")
  is written first, however long that takes; --discard drops data that cannot be
  written.
";

pub(super) const SET: &str = "\
Examples:
  genblk set vm1 cache.size=2G
  genblk set vm1 cache.mode=writethrough
  genblk set vm1 poll_us=0 cache.dirty_max_percent=10
  genblk set vm1 limits.total_iops=2000 limits.write_bytes_per_second=50M

Notes:
  Either all keys change or none. Changes take effect immediately, and survive a
  crash or hand-over of the daemon, but not a clean stop. To keep them longer,
  edit the configuration. Keys that cannot change while a disk is served, such
  as image, are refused; see genblk.toml(5).
";

pub(super) const RELOAD: &str = "\
Examples:
  genblk reload --dry-run   show what would change
  genblk reload

Notes:
  A reload attaches new disks, changes keys, and detaches disks that are no
  longer in the file, unless they are in use. If the file has an error, or a new
  disk cannot be served, nothing changes. SIGHUP does the same and logs the
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
  genblk resize vm1 20G --shrink                  the data beyond 20 GiB is lost

Notes:
  The guest sees the new size immediately if its front-end accepts messages from
  the back-end (QEMU does). The size must be a multiple of 4096 bytes. To resize
  a disk on an NBD server, or to shrink a block device, detach the disk and
  attach it again.
  Before --shrink, make the guest's file system and partition smaller: requests
  beyond the new end fail immediately. If the image fails, the disk keeps its
  size. The image is cut only after everything is written to it.
";

pub(super) const EVENTS: &str = "\
Examples:
  genblk events              events that the daemon has kept, at most 1024
  genblk events -f vm1       events of one disk, and new ones as they come
  genblk events -f --json    for programs

Notes:
  A line has the time (UTC), the disk, the event, and details. Front-ends and
  states are checked four times a second; shorter changes cause no event.
";

pub(super) const FLUSH: &str = "\
Examples:
  genblk flush vm1

Notes:
  Does the same as a FLUSH from the guest. Writes that complete meanwhile may or
  may not be durable afterwards.
";

pub(super) const DROP: &str = "\
Examples:
  genblk drop vm1             to measure with a cold cache
  genblk drop vm1 --flushed   dirty pages as well, once they are written
";

pub(super) const WARM: &str = "\
Examples:
  genblk resident vm1 > boot.list     after the guest has started
  genblk warm vm1 --from boot.list    before it starts again
  genblk warm vm1                     the whole disk, as far as it fits

Notes:
  Pages are read into free memory, and in place of pages that the guest has used
  only once, while no guest waits for a page, and with few operations at a time.
  It ends when only other pages are left. A list of another disk
  costs time and memory, and no guest reads wrong data because of it. Progress is
  printed to standard error once a second. The command ends with its connection:
  interrupt it to stop.
";

pub(super) const RESIDENT: &str = "\
Examples:
  genblk resident vm1
  genblk resident vm1 > hot.list

Notes:
  Each line is OFFSET+BYTES, in bytes, sorted.
";

pub(super) const RESUME: &str = "\
Examples:
  genblk resume vm1

Notes:
  Use this when an image works again after an error. With on_error = \"stop\"
  the guest gets errors until then; otherwise genblk retries by itself, and this
  command only saves the wait.
";

pub(super) const FREEZE: &str = "\
Examples:
  genblk freeze vm1 -- lvcreate -s -n vm1-snap -L 2G vg0/vm1
  genblk freeze vm1 -- cp --reflink=always /srv/vm1.img /srv/vm1.copy
  genblk freeze vm1 --timeout 30s && btrfs subvolume snapshot /srv /snap && \\
      genblk thaw vm1

Notes:
  A frozen image is in the state after a FLUSH, and does not change until the
  thaw; the guest's writes wait. To copy a file system that needs no journal
  replay, freeze it in the guest first (virsh domfsfreeze).
  If the freeze ends before the command or the thaw, that is an error: the copy
  is inconsistent. Without a thaw, a freeze ends after its timeout.
  With COMMAND, genblk exits with its status, or with 1 if the freeze ended
  early.
";

pub(super) const THAW: &str = "\
Examples:
  genblk thaw vm1

Notes:
  Reports whether the image stayed unchanged since the freeze. If it did not, a
  copy made meanwhile is inconsistent.
";
