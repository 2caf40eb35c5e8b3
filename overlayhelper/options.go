/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package main

import (
	"errors"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// volumeOption names the option that tells a Kata runtime what to mount in the
// guest (src/libs/kata-types/src/mount.rs of kata-containers). It means nothing
// to the host's kernel, and its value is never shown.
const volumeOption = "io.katacontainers.volume"

// request is one invocation of the program.
type request struct {
	help    bool
	version bool

	// fake checks everything and mounts nothing (mount -f).
	fake    bool
	verbose bool

	// namespace is a process ID or the path of a mount namespace, or empty
	// for the caller's own (mount -N).
	namespace string

	overlay overlay
}

// option is an option that is left to the kernel.
type option struct {
	key string
	// value is as it was written: escaped, and in quotes if it had any.
	value string
	// hasValue tells "key=" from "key".
	hasValue bool
}

// A generic option of mount(8) sets and clears mount flags. What is set comes
// last: "noatime" after "strictatime" is noatime alone.
type generic struct {
	name       string
	set, clear uintptr
}

// The three access time modes exclude each other; mount(2) given two of them
// prefers strictatime whatever the order was.
const atimeModes = unix.MS_NOATIME | unix.MS_RELATIME | unix.MS_STRICTATIME

// generics has the options of mount(8), "FILESYSTEM-INDEPENDENT MOUNT OPTIONS",
// that a helper acts on or has to swallow. It is searched in order: the list is
// short, and a map would have to be built at each start.
var generics = []generic{
	{"ro", unix.MS_RDONLY, 0},
	{"rw", 0, unix.MS_RDONLY},
	{"nosuid", unix.MS_NOSUID, 0},
	{"suid", 0, unix.MS_NOSUID},
	{"nodev", unix.MS_NODEV, 0},
	{"dev", 0, unix.MS_NODEV},
	{"noexec", unix.MS_NOEXEC, 0},
	{"exec", 0, unix.MS_NOEXEC},
	{"sync", unix.MS_SYNCHRONOUS, 0},
	{"async", 0, unix.MS_SYNCHRONOUS},
	{"dirsync", unix.MS_DIRSYNC, 0},
	{"noatime", unix.MS_NOATIME, atimeModes},
	{"atime", 0, unix.MS_NOATIME},
	{"relatime", unix.MS_RELATIME, atimeModes},
	{"norelatime", 0, unix.MS_RELATIME},
	{"strictatime", unix.MS_STRICTATIME, atimeModes},
	{"nostrictatime", 0, unix.MS_STRICTATIME},
	{"nodiratime", unix.MS_NODIRATIME, 0},
	{"diratime", 0, unix.MS_NODIRATIME},
	{"lazytime", unix.MS_LAZYTIME, 0},
	{"nolazytime", 0, unix.MS_LAZYTIME},
	{"nosymfollow", unix.MS_NOSYMFOLLOW, 0},
	{"symfollow", 0, unix.MS_NOSYMFOLLOW},
	{"mand", unix.MS_MANDLOCK, 0},
	{"nomand", 0, unix.MS_MANDLOCK},
	{"silent", unix.MS_SILENT, 0},
	{"loud", 0, unix.MS_SILENT},

	// What lets an ordinary user mount also takes rights from the mount,
	// unless a later option gives them back.
	{"user", unix.MS_NOEXEC | unix.MS_NOSUID | unix.MS_NODEV, 0},
	{"users", unix.MS_NOEXEC | unix.MS_NOSUID | unix.MS_NODEV, 0},
	{"owner", unix.MS_NOSUID | unix.MS_NODEV, 0},
	{"group", unix.MS_NOSUID | unix.MS_NODEV, 0},

	// These speak to mount(8), to fstab's readers or to people.
	{"defaults", 0, 0},
	{"nouser", 0, 0},
	{"nousers", 0, 0},
	{"noowner", 0, 0},
	{"nogroup", 0, 0},
	{"auto", 0, 0},
	{"noauto", 0, 0},
	{"_netdev", 0, 0},
	{"nofail", 0, 0},
}

// refusals has the options that ask for something else than a new overlay
// mount. Ignoring them would report a success that is none.
var refusals = []struct{ name, remedy string }{
	{"remount", "use \"mount -i -o remount,OPTIONS TARGET\", which calls no helper"},
	{"bind", "use \"mount --bind\""},
	{"rbind", "use \"mount --rbind\""},
	{"move", "use \"mount --move\""},
	{"shared", "use \"mount --make-shared TARGET\" afterwards"},
	{"rshared", "use \"mount --make-rshared TARGET\" afterwards"},
	{"slave", "use \"mount --make-slave TARGET\" afterwards"},
	{"rslave", "use \"mount --make-rslave TARGET\" afterwards"},
	{"private", "use \"mount --make-private TARGET\" afterwards"},
	{"rprivate", "use \"mount --make-rprivate TARGET\" afterwards"},
	{"unbindable", "use \"mount --make-unbindable TARGET\" afterwards"},
	{"runbindable", "use \"mount --make-runbindable TARGET\" afterwards"},
}

// parseArgs reads the arguments after the program's name. Flags and words come
// in any order, and flags of one letter can be joined, as getopt(3) allows.
// Every error it returns is one of usage.
func parseArgs(args []string) (*request, error) {
	var (
		req       request
		words     []string
		options   []string
		wordsOnly bool
	)
	for i := 0; i < len(args); i++ {
		arg := args[i]
		switch {
		case wordsOnly || arg == "-" || !strings.HasPrefix(arg, "-"):
			words = append(words, arg)
			continue
		case arg == "--":
			wordsOnly = true
			continue
		case arg == "--help":
			req.help = true
			continue
		case arg == "--version":
			req.version = true
			continue
		case strings.HasPrefix(arg, "--"):
			flag, _, _ := strings.Cut(arg[2:], "=")
			return nil, errors.New("unknown flag --" + showKey(flag))
		}
		for j := 1; j < len(arg); j++ {
			var value *string
			switch arg[j] {
			case 'h':
				req.help = true
			case 'V':
				req.version = true
			case 'f':
				req.fake = true
			case 'v':
				req.verbose = true
			case 'n', 's':
				// No mtab is written, and overlayfs has no sloppy mode.
			case 'o':
				options = append(options, "")
				value = &options[len(options)-1]
			case 'N':
				value = &req.namespace
			case 't':
				value = new(string)
			default:
				return nil, errors.New("unknown flag -" + show(arg[j:j+1]))
			}
			if value == nil {
				continue
			}
			if *value = arg[j+1:]; *value == "" {
				if i++; i == len(args) {
					return nil, errors.New("flag -" + arg[j:j+1] + " needs a value")
				}
				*value = args[i]
			}
			break
		}
	}
	if req.help || req.version {
		return &req, nil
	}
	if len(words) != 2 {
		// The words are not shown: a lost "-o" turns options into words.
		return nil, errors.New("a source and a target are needed, and nothing else, but there are " +
			strconv.Itoa(len(words)) + " arguments")
	}
	if words[1] == "" {
		return nil, errors.New("the target is empty")
	}
	ov, err := parseOptions(options)
	if err != nil {
		return nil, errors.New(show(words[1]) + ": " + err.Error())
	}
	ov.source, ov.target = words[0], words[1]
	req.overlay = *ov
	return &req, nil
}

// parseOptions reads the values of all -o flags, each a list of options.
func parseOptions(lists []string) (*overlay, error) {
	var ov overlay
	for _, list := range lists {
		texts, err := splitOptions(list)
		if err != nil {
			return nil, err
		}
		for _, text := range texts {
			key, value, hasValue := strings.Cut(text, "=")
			if remedy := refusal(key); remedy != "" && !hasValue {
				return nil, errors.New("option " + key + " is not supported here; " + remedy)
			}
			if flags, ok := applyGeneric(ov.flags, key, hasValue); ok {
				ov.flags = flags
				continue
			}
			switch key {
			case volumeOption:
			case "lowerdir":
				if len(ov.lower) > 0 {
					return nil, errors.New("option lowerdir is given twice")
				}
				if ov.lower, err = splitLowerdir(value); err != nil {
					return nil, err
				}
			case "upperdir", "workdir":
				dir := &ov.upper
				if key == "workdir" {
					dir = &ov.work
				}
				if *dir != "" {
					return nil, errors.New("option " + key + " is given twice")
				}
				if *dir = unescape(value); *dir == "" {
					return nil, errors.New("option " + key + " has no value")
				}
			default:
				ov.other = append(ov.other, option{key, value, hasValue})
			}
		}
	}
	switch {
	case len(ov.lower) == 0:
		return nil, errors.New("option lowerdir is missing")
	case ov.upper != "" && ov.work == "":
		return nil, errors.New("option workdir is missing: upperdir needs an empty directory next to it, on the same file system")
	}
	return &ov, nil
}

// applyGeneric gives the flags after a generic option, and false if it is none.
func applyGeneric(flags uintptr, key string, hasValue bool) (uintptr, bool) {
	if hasValue {
		switch {
		case key == "user":
			// mount(8) records who mounted; the meaning is that of "user".
		case key == "comment", isComment(key):
			return flags, true
		default:
			return flags, false
		}
	}
	for _, g := range generics {
		if g.name == key {
			return flags&^g.clear | g.set, true
		}
	}
	return flags, isComment(key)
}

// isComment says whether an option is for other programs by its prefix.
func isComment(key string) bool {
	return strings.HasPrefix(key, "x-") || strings.HasPrefix(key, "X-")
}

func refusal(key string) string {
	for _, r := range refusals {
		if r.name == key {
			return r.remedy
		}
	}
	return ""
}

// splitOptions splits a list at its commas, and leaves out empty options. As in
// overlayfs, a backslash takes the meaning from the character after it. As in
// SELinux, the value of a context option may be in double quotes, and have
// commas in it then.
func splitOptions(list string) ([]string, error) {
	var texts []string
	for start := 0; start < len(list); {
		end := start
		if key, value, ok := strings.Cut(list[start:], "="); ok && isContext(key) && strings.HasPrefix(value, `"`) {
			closing := strings.IndexByte(value[1:], '"')
			if closing < 0 {
				return nil, errors.New("the value of option " + key + " has no closing quote")
			}
			end += len(key) + len(`="`) + closing + len(`"`)
		}
		for end < len(list) && list[end] != ',' {
			if list[end] == '\\' {
				end++
			}
			end++
		}
		if end > len(list) {
			return nil, errors.New(`the options end in a "\" with nothing after it; write "\\" for a backslash`)
		}
		if end > start {
			texts = append(texts, list[start:end])
		}
		start = end + 1
	}
	return texts, nil
}

// isContext says whether an option is one of SELinux, which mount(8) takes in
// quotes.
func isContext(key string) bool {
	switch key {
	case "context", "fscontext", "defcontext", "rootcontext":
		return true
	}
	return false
}

// show makes a path fit for a message of one line.
func show(path string) string {
	odd := path == "" || !utf8.ValidString(path)
	for _, r := range path {
		odd = odd || r == ' ' || r == '"' || r == '\\' || !strconv.IsPrint(r)
	}
	if odd {
		return strconv.Quote(path)
	}
	return path
}

// showKey shows an option's name, unless it looks like anything but a name,
// such as base64: then it may be the half of a value.
func showKey(key string) string {
	const longest = 32
	ok := key != "" && len(key) <= longest
	for _, r := range key {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
		case r == '_' || r == '-' || r == '.' || r == '+':
		default:
			ok = false
		}
	}
	if !ok {
		return "(not shown)"
	}
	return key
}
