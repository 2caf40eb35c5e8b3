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
	"strings"
)

// layer is a directory below the upper one.
type layer struct {
	path string
	// data says that overlayfs reaches the layer only through redirects in
	// the layers above ("::" in lowerdir).
	data bool
}

// overlay is an overlay mount to be made. Its paths are the real ones, without
// escapes.
type overlay struct {
	source, target string
	// flags are those of mount(2), MS_RDONLY and so on.
	flags uintptr

	// dir is the directory that relative layers, upper and work belong to,
	// or empty for the current one.
	dir         string
	lower       []layer
	upper, work string
	other       []option
}

// splitLowerdir reads the value of a lowerdir option: layers from top to
// bottom after ":", data layers, which come last, after "::".
func splitLowerdir(value string) ([]layer, error) {
	var (
		layers []layer
		data   bool
	)
	for {
		end := 0
		for end < len(value) && value[end] != ':' {
			if value[end] == '\\' {
				end++
			}
			end++
		}
		end = min(end, len(value))
		if end == 0 {
			return nil, errors.New("option lowerdir is empty or has an empty path in it; write \"\\:\" for a colon in a path")
		}
		layers = append(layers, layer{unescape(value[:end]), data})
		if end == len(value) {
			return layers, nil
		}
		value = value[end+1:]
		switch colons := strings.HasPrefix(value, ":"); {
		case colons:
			data = true
			value = value[1:]
		case data:
			return nil, errors.New("option lowerdir has a layer after \":\" below one after \"::\"; data layers come last")
		}
	}
}

// unescape undoes escape. Like overlayfs, it takes any character after a
// backslash for itself, and drops a backslash at the end.
func unescape(value string) string {
	if strings.IndexByte(value, '\\') < 0 {
		return value
	}
	var b strings.Builder
	for i := 0; i < len(value); i++ {
		if value[i] == '\\' {
			if i++; i == len(value) {
				break
			}
		}
		b.WriteByte(value[i])
	}
	return b.String()
}

// escape writes a path as overlayfs reads it in the data of mount(2), and, for
// upperdir and workdir only, in the strings of fsconfig(2) too (ovl_unescape in
// fs/overlayfs/params.c). The kernel takes the path of lowerdir+ as it is.
func escape(path string) string {
	if !strings.ContainsAny(path, `\:,`) {
		return path
	}
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		switch path[i] {
		case '\\', ':', ',':
			b.WriteByte('\\')
		}
		b.WriteByte(path[i])
	}
	return b.String()
}

// data writes the overlay as the data of mount(2).
func (o *overlay) data() string {
	var b strings.Builder
	for i, l := range o.lower {
		switch {
		case i == 0:
			b.WriteString("lowerdir=")
		case l.data:
			b.WriteString("::")
		default:
			b.WriteString(":")
		}
		b.WriteString(escape(l.path))
	}
	if o.upper != "" {
		b.WriteString(",upperdir=" + escape(o.upper))
	}
	if o.work != "" {
		b.WriteString(",workdir=" + escape(o.work))
	}
	for _, opt := range o.other {
		b.WriteString("," + opt.key)
		if opt.hasValue {
			b.WriteString("=" + opt.value)
		}
	}
	return b.String()
}

// parameters writes the overlay as strings for fsconfig(2), in order. A
// parameter with no value is a flag.
func (o *overlay) parameters() []option {
	params := make([]option, 0, len(o.lower)+len(o.other)+3)
	params = append(params, option{"source", o.source, true})
	for _, l := range o.lower {
		key := lowerKey
		if l.data {
			key = dataKey
		}
		params = append(params, option{key, l.path, true})
	}
	if o.upper != "" {
		params = append(params, option{"upperdir", escape(o.upper), true})
	}
	if o.work != "" {
		params = append(params, option{"workdir", escape(o.work), true})
	}
	for _, opt := range o.other {
		if isContext(opt.key) {
			// Only SELinux's parser of mount(2) data removes the quotes.
			opt.value = strings.Trim(opt.value, `"`)
		}
		params = append(params, opt)
	}
	return params
}

// isAbsolute says whether no path depends on the working directory.
func (o *overlay) isAbsolute() bool {
	for _, l := range o.lower {
		if !strings.HasPrefix(l.path, "/") {
			return false
		}
	}
	return strings.HasPrefix(o.target, "/") &&
		(o.upper == "" || strings.HasPrefix(o.upper, "/")) &&
		(o.work == "" || strings.HasPrefix(o.work, "/"))
}

// absolute gives the overlay with paths that hold in any working directory.
// They are not cleaned: "a/../b" need not be "b" where a is a symbolic link.
func (o overlay) absolute(cwd string) *overlay {
	abs := func(path string) string {
		if path == "" || strings.HasPrefix(path, "/") {
			return path
		}
		return strings.TrimSuffix(cwd, "/") + "/" + path
	}
	lower := make([]layer, len(o.lower))
	for i, l := range o.lower {
		lower[i] = layer{abs(l.path), l.data}
	}
	o.target, o.lower, o.upper, o.work = abs(o.target), lower, abs(o.upper), abs(o.work)
	return &o
}

// shortened gives the overlay with layers relative to the directory that they
// have in common. The paths must be absolute.
func (o overlay) shortened() *overlay {
	// The common directory is the parent of one of the layers at most, so
	// that each layer keeps a name.
	for i, l := range o.lower {
		path := strings.TrimRight(l.path, "/")
		parent := path[:strings.LastIndexByte(path, '/')+1]
		if i == 0 {
			o.dir = parent
			continue
		}
		n := 0
		for n < len(o.dir) && n < len(parent) && o.dir[n] == parent[n] {
			n++
		}
		o.dir = o.dir[:strings.LastIndexByte(o.dir[:n], '/')+1]
	}
	if o.dir == "" {
		o.dir = "/"
	}
	rel := func(path string) string {
		rest, ok := strings.CutPrefix(path, o.dir)
		if !ok {
			return path
		}
		if rest = strings.TrimLeft(rest, "/"); rest == "" {
			return "."
		}
		return rest
	}
	lower := make([]layer, len(o.lower))
	for i, l := range o.lower {
		lower[i] = layer{rel(l.path), l.data}
	}
	o.lower = lower
	if o.upper != "" {
		o.upper = rel(o.upper)
	}
	if o.work != "" {
		o.work = rel(o.work)
	}
	return &o
}
