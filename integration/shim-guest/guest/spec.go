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

package guest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// spec is a bundle's config.json with everything that is in it: what the guest
// does not know is written back as it was.
type spec struct {
	path string
	doc  map[string]any
}

func readSpec(bundle string) (*spec, error) {
	s := &spec{path: filepath.Join(bundle, "config.json")}
	b, err := os.ReadFile(s.path)
	if err != nil {
		return nil, fmt.Errorf("read the OCI configuration: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber() // a limit of more than 2^53 has to stay what it is
	if err := dec.Decode(&s.doc); err != nil {
		return nil, fmt.Errorf("read the OCI configuration %s: %w: %w", s.path, errdefs.ErrInvalidArgument, err)
	}
	if s.doc == nil {
		return nil, fmt.Errorf("read the OCI configuration %s: %w: it is null", s.path, errdefs.ErrInvalidArgument)
	}
	return s, nil
}

func (s *spec) annotations() map[string]string {
	m := map[string]string{}
	for k, v := range s.object("annotations") {
		if str, ok := v.(string); ok {
			m[k] = str
		}
	}
	return m
}

// setRoot sets the path of the root file system.
func (s *spec) setRoot(path string) {
	s.object("root")["path"] = path
}

// setProcess sets the only program of the root file system as the process.
func (s *spec) setProcess(args ...string) {
	p := s.object("process")
	p["args"] = args
	p["cwd"] = "/"
}

// moveNamespaces has the container join the namespaces of one process where the
// host, which knows no better, told it to join another's.
func (s *spec) moveNamespaces(from, to int) {
	list, _ := s.object("linux")["namespaces"].([]any)
	for _, v := range list {
		ns, ok := v.(map[string]any)
		if !ok {
			continue
		}
		path, _ := ns["path"].(string)
		if name, ok := strings.CutPrefix(path, fmt.Sprintf("/proc/%d/ns/", from)); ok {
			ns["path"] = fmt.Sprintf("/proc/%d/ns/%s", to, name)
		}
	}
}

func (s *spec) write() error {
	b, err := json.Marshal(s.doc)
	if err != nil {
		return fmt.Errorf("write the OCI configuration: %w", err)
	}
	st, err := os.Stat(s.path)
	if err != nil {
		return fmt.Errorf("write the OCI configuration: %w", err)
	}
	if err := os.WriteFile(s.path, b, st.Mode().Perm()); err != nil {
		return fmt.Errorf("write the OCI configuration: %w", err)
	}
	return nil
}

// object returns an object of the top level, made when it is not there.
func (s *spec) object(key string) map[string]any {
	if m, ok := s.doc[key].(map[string]any); ok {
		return m
	}
	m := map[string]any{}
	s.doc[key] = m
	return m
}
