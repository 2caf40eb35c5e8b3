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

package enable

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// importGlob is what an import of the drop-in alone looks like. It has a * because
// containerd does not start without a file that is imported by its name.
func (n Node) importGlob() string { return filepath.Join(n.confD(), "60-guest-pull-handlers*.toml") }

// importLine is the line that is put at the top of a config.toml without imports.
func (n Node) importLine() []byte {
	return fmt.Appendf(nil, "imports = [%q] # containerd guest-pull enable\n", n.importGlob())
}

// importItem is what is put first into the imports of a config.toml that has some.
func (n Node) importItem() []byte { return fmt.Appendf(nil, "%q, ", n.importGlob()) }

// main returns the text of config.toml with which the drop-in is imported, or, when
// it is not wanted any more, without what was added for it.
func (n Node) main(wanted bool) ([]byte, error) {
	text, err := readFile(n.Config)
	if err != nil {
		return nil, err
	}
	fresh := fmt.Appendf(nil, newConfig, filepath.Join(n.confD(), "*.toml"))
	if !wanted {
		if bytes.Equal(text, fresh) {
			others, err := filepath.Glob(filepath.Join(n.confD(), "*.toml"))
			if err != nil {
				return nil, err
			}
			// A containerd without the file would not read those of others.
			if len(slices.DeleteFunc(others, func(p string) bool { return p == n.dropIn() })) == 0 {
				return nil, nil
			}
		}
		if bytes.Contains(text, n.importLine()) {
			return bytes.Replace(text, n.importLine(), nil, 1), nil
		}
		return bytes.Replace(text, n.importItem(), nil, 1), nil
	}
	if text == nil {
		return fresh, nil
	}
	patterns, err := n.imports(text)
	if err != nil {
		return nil, err
	}
	for _, pattern := range patterns {
		if hit, err := filepath.Match(pattern, n.dropIn()); err == nil && hit {
			return text, nil
		}
	}
	if !n.Import {
		return nil, fmt.Errorf("%s does not import %s: add %q to its imports, or let this command do it (--import): %w",
			n.Config, n.dropIn(), n.importGlob(), errdefs.ErrFailedPrecondition)
	}
	at, found, err := importsAt(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", n.Config, err, errdefs.ErrFailedPrecondition)
	}
	insert := n.importLine()
	if found {
		insert = n.importItem()
	}
	changed := slices.Concat(text[:at], insert, text[at:])
	if patterns, err = n.imports(changed); err != nil || !slices.Contains(patterns, n.importGlob()) {
		return nil, fmt.Errorf("%s cannot be changed by this command: add %q to its imports: %w", n.Config, n.importGlob(), errdefs.ErrFailedPrecondition)
	}
	return changed, nil
}

// imports returns what config.toml imports, as absolute paths and patterns.
func (n Node) imports(text []byte) ([]string, error) {
	var t struct {
		Imports []string `toml:"imports"`
	}
	if err := toml.Unmarshal(text, &t); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", n.Config, err, errdefs.ErrFailedPrecondition)
	}
	for i, pattern := range t.Imports {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(n.Config), pattern)
		}
		t.Imports[i] = filepath.Clean(pattern)
	}
	return t.Imports, nil
}

// importsAt finds where the first item of the imports begins, or, for a file
// without, the beginning of the file.
func importsAt(text []byte) (at int, found bool, err error) {
	p := unstable.Parser{}
	p.Reset(text)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind == unstable.Table || e.Kind == unstable.ArrayTable {
			break
		}
		if e.Kind != unstable.KeyValue {
			continue
		}
		keys := e.Key()
		if !keys.Next() || string(keys.Node().Data) != "imports" || keys.Next() {
			continue
		}
		// The array begins at the first bracket behind the key.
		key := e.Key()
		key.Next()
		start := int(key.Node().Raw.Offset + key.Node().Raw.Length)
		bracket := bytes.IndexByte(text[start:], '[')
		if bracket < 0 {
			return 0, false, fmt.Errorf("imports is not a list")
		}
		return start + bracket + 1, true, nil
	}
	return 0, false, p.Error()
}
