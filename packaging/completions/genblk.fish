# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_genblk_global_optspecs
    string join \n config= check strict print-capabilities socket-path= fd= socket-mode= socket-group= blk-file= format= read-only cache-size= cache-mode= num-queues= serial= memory-dir= sandbox= h/help V/version
end

function __fish_genblk_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_genblk_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_genblk_using_subcommand
    set -l cmd (__fish_genblk_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c genblk -n "__fish_genblk_needs_command" -l config -d 'Serve the devices of this TOML file' -r -F
complete -c genblk -n "__fish_genblk_needs_command" -l socket-path -d 'Listen on this Unix domain socket' -r -F
complete -c genblk -n "__fish_genblk_needs_command" -l fd -d 'Listen on this inherited descriptor (a Unix domain socket) instead' -r
complete -c genblk -n "__fish_genblk_needs_command" -l socket-mode -d 'Mode of the socket, in octal [default: 0600]' -r
complete -c genblk -n "__fish_genblk_needs_command" -l socket-group -d 'Group of the socket: a name or a number [default: the daemon\'s own]' -r
complete -c genblk -n "__fish_genblk_needs_command" -l blk-file -d 'Serve this raw image file or block device, or the NBD export with this URI' -r -F
complete -c genblk -n "__fish_genblk_needs_command" -l format -d 'Image format: auto (refuses qcow2, VMDK, LUKS, gzip and the like), raw [default: auto]' -r
complete -c genblk -n "__fish_genblk_needs_command" -l cache-size -d 'Memory for cached pages, such as 64M or 4G [default: 256M]' -r
complete -c genblk -n "__fish_genblk_needs_command" -l cache-mode -d 'When writes complete: writeback, writethrough, none (see below) [default: writeback]' -r
complete -c genblk -n "__fish_genblk_needs_command" -l num-queues -d 'Request queues that the guest may use, 1 to 256 [default: 256]' -r
complete -c genblk -n "__fish_genblk_needs_command" -l serial -d 'Serial that the guest reads, at most 20 characters [default: disk0]' -r
complete -c genblk -n "__fish_genblk_needs_command" -l memory-dir -d 'Directory in shared memory for the cache, which survives the daemon there, or "systemd" [default: /dev/shm]' -r -F
complete -c genblk -n "__fish_genblk_needs_command" -l sandbox -d 'Confine the threads that serve the disk: on, off (for debugging) [default: on]' -r
complete -c genblk -n "__fish_genblk_needs_command" -l check -d 'Check the configuration, images, sockets and memory, report all problems, and exit'
complete -c genblk -n "__fish_genblk_needs_command" -l strict -d 'Serve no disk unless all can be served; without this, the others are served'
complete -c genblk -n "__fish_genblk_needs_command" -l print-capabilities -d 'Print the capabilities of this back-end as JSON and exit; all other options are ignored'
complete -c genblk -n "__fish_genblk_needs_command" -l read-only -d 'Make the disk read-only'
complete -c genblk -n "__fish_genblk_needs_command" -s h -l help -d 'Print help'
complete -c genblk -n "__fish_genblk_needs_command" -s V -l version -d 'Print version'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "recover" -d 'List the caches that daemons left; with CACHE, write one to its image'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "disk-process" -d 'Serve one image for the daemon that starts this process'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "list" -d 'List the disks of a running daemon'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "stat" -d 'Show statistics of the disks of a running daemon: rates, latencies, hits'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "attach" -d 'Add the disks of a file to a running daemon'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "detach" -d 'Write all dirty data of a disk to its image, and stop serving it'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "set" -d 'Change keys of a disk while it is served'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "reload" -d 'Reload the configuration file'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "config" -d 'Show the current configuration'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "events" -d 'Show recent events of a running daemon and its disks'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "flush" -d 'Make all completed writes of a disk durable'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "drop" -d 'Drop a disk\'s clean pages from its cache'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "warm" -d 'Read a disk, or a list of its extents, into its cache'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "resident" -d 'List the extents of a disk that are in its cache'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "resize" -d 'Change the size of a disk while a guest uses it'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "resume" -d 'Retry failed operations and stopped write-back, because the image works again'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "freeze" -d 'Write all dirty data of a disk and hold new writes, for a copy or snapshot on the host'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "thaw" -d 'End a freeze'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "top" -d 'Watch the disks of a running daemon on a terminal'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "exporter" -d 'Export metrics of a running daemon to Prometheus'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "take-over" -d 'Give up completed writes that a lost cache of IMAGE may hold, so that IMAGE can be served'
complete -c genblk -n "__fish_genblk_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c genblk -n "__fish_genblk_using_subcommand recover" -l image -d 'The new path of CACHE\'s image, if it has moved' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand recover" -l memory-dir -d 'Directory to search: a memory directory, or a folder of caches in it' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand recover" -l discard -d 'Remove CACHE without writing anything to its image'
complete -c genblk -n "__fish_genblk_using_subcommand recover" -l force -d 'Discard dirty pages without asking; write to an image even if it cannot be shown to be CACHE\'s'
complete -c genblk -n "__fish_genblk_using_subcommand recover" -l prune -d 'Remove all caches that hold no unwritten data'
complete -c genblk -n "__fish_genblk_using_subcommand recover" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand disk-process" -s h -l help -d 'Print help'
complete -c genblk -n "__fish_genblk_using_subcommand list" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand list" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s l -l latencies -d 'Latencies, one line per kind of request'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s w -l histograms -d 'Histograms of the latencies of requests, in powers of two'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s r -l sizes -d 'Sizes of requests and of operations on the image, in powers of two'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s c -l cache -d 'The caches: hits, readahead, evictions, dirty data'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s x -l why -d 'What delays requests, in numbers and in words: the image, a lack of memory, write-back, limits'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s H -l scripted -d 'Output for programs: separated by tabs, without a header'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s p -l parsable -d 'Exact numbers: bytes and nanoseconds'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s T -l time -d 'Print the time (seconds since 1970) above each report'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s y -l omit-first -d 'Omit the first report, which covers the time since the daemon started'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand stat" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand attach" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand attach" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand attach" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand detach" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand detach" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand detach" -l force -d 'Detach it even while a guest uses it; if its image fails, its cache stays for "genblk recover"'
complete -c genblk -n "__fish_genblk_using_subcommand detach" -l discard -d 'If its cache is volatile (survive = "never"), discard dirty data that cannot be written to its image'
complete -c genblk -n "__fish_genblk_using_subcommand detach" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand set" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand set" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand set" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand reload" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand reload" -l dry-run -d 'Only show what would change'
complete -c genblk -n "__fish_genblk_using_subcommand reload" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand reload" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand config" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand config" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand config" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand events" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand events" -s f -l follow -d 'Keep printing events as they occur'
complete -c genblk -n "__fish_genblk_using_subcommand events" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand events" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand flush" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand flush" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand flush" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand drop" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand drop" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand drop" -l flushed -d 'Write dirty pages first, then drop them too'
complete -c genblk -n "__fish_genblk_using_subcommand drop" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand warm" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand warm" -l from -d 'A list that "genblk resident" has printed; "-": standard input; without this, the whole disk' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand warm" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand warm" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand resident" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand resident" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand resident" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand resize" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand resize" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand resize" -l shrink -d 'Allow a smaller size; the data beyond the new end is lost'
complete -c genblk -n "__fish_genblk_using_subcommand resize" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand resume" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand resume" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand resume" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand freeze" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand freeze" -l timeout -d 'Time after which the freeze ends by itself, counted from its start: 1ms to 60s' -r
complete -c genblk -n "__fish_genblk_using_subcommand freeze" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand freeze" -l reads -d 'Hold reads as well as writes'
complete -c genblk -n "__fish_genblk_using_subcommand freeze" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand thaw" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand thaw" -l json -d 'Print the daemon\'s reply as one line of JSON'
complete -c genblk -n "__fish_genblk_using_subcommand thaw" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand top" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand top" -l once -d 'Print one screen as text after one interval, and exit'
complete -c genblk -n "__fish_genblk_using_subcommand top" -l no-color -d 'Use no colours, as with NO_COLOR in the environment'
complete -c genblk -n "__fish_genblk_using_subcommand top" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand exporter" -l listen -d 'Serve GET /metrics over HTTP on this TCP address (127.0.0.1:9950), on a Unix domain socket at this path (/run/genblk-exporter.sock), or on the socket passed by systemd (systemd)' -r
complete -c genblk -n "__fish_genblk_using_subcommand exporter" -l socket -d 'Control socket of the daemon' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand exporter" -l once -d 'Print the metrics to standard output and exit, for example for node_exporter\'s textfile directory'
complete -c genblk -n "__fish_genblk_using_subcommand exporter" -l no-histograms -d 'Show only the sum and the count of histograms'
complete -c genblk -n "__fish_genblk_using_subcommand exporter" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand take-over" -l memory-dir -d 'Directory to search for its caches' -r -F
complete -c genblk -n "__fish_genblk_using_subcommand take-over" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "recover" -d 'List the caches that daemons left; with CACHE, write one to its image'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "disk-process" -d 'Serve one image for the daemon that starts this process'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "list" -d 'List the disks of a running daemon'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "stat" -d 'Show statistics of the disks of a running daemon: rates, latencies, hits'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "attach" -d 'Add the disks of a file to a running daemon'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "detach" -d 'Write all dirty data of a disk to its image, and stop serving it'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "set" -d 'Change keys of a disk while it is served'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "reload" -d 'Reload the configuration file'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "config" -d 'Show the current configuration'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "events" -d 'Show recent events of a running daemon and its disks'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "flush" -d 'Make all completed writes of a disk durable'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "drop" -d 'Drop a disk\'s clean pages from its cache'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "warm" -d 'Read a disk, or a list of its extents, into its cache'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "resident" -d 'List the extents of a disk that are in its cache'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "resize" -d 'Change the size of a disk while a guest uses it'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "resume" -d 'Retry failed operations and stopped write-back, because the image works again'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "freeze" -d 'Write all dirty data of a disk and hold new writes, for a copy or snapshot on the host'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "thaw" -d 'End a freeze'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "top" -d 'Watch the disks of a running daemon on a terminal'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "exporter" -d 'Export metrics of a running daemon to Prometheus'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "take-over" -d 'Give up completed writes that a lost cache of IMAGE may hold, so that IMAGE can be served'
complete -c genblk -n "__fish_genblk_using_subcommand help; and not __fish_seen_subcommand_from recover disk-process list stat attach detach set reload config events flush drop warm resident resize resume freeze thaw top exporter take-over help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
