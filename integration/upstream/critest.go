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
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// critest is one Go test with cases of its own (Ginkgo's), whose names are sentences.
// Here they get underscores for spaces and slashes, as Go's subtests do, and dots
// match them.

const (
	critestReport = "/tmp/junit.xml"
	critestTest   = "TestCRISuite"
)

// caseLabels are what a report adds to the name of a case, and a focus does not match.
var caseLabels = regexp.MustCompile(`(_\\?\[\w+\\?\])+$`)

// critestArgs are the flags for the cases that match a regular expression of go
// test's.
func critestArgs(expr string) []string {
	args := []string{"-test.timeout=60m", "-ginkgo.v", "-ginkgo.no-color", "-ginkgo.timeout=55m", "-ginkgo.seed=1", "-ginkgo.junit-report=" + critestReport}
	if expr != "" {
		expr = caseLabels.ReplaceAllString(strings.TrimSuffix(strings.TrimPrefix(expr, "^"), "$"), "")
		args = append(args, "-ginkgo.focus="+strings.ReplaceAll(expr, "_", "."))
	}
	return args
}

// printReport prints the results in a JUnit report as go test does.
func printReport(path string, w io.Writer) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("critest has ended without a report: %w", err)
	}
	var report struct {
		Suites []struct {
			Cases []struct {
				Name   string  `xml:"name,attr"`
				Status string  `xml:"status,attr"`
				Time   float64 `xml:"time,attr"`
				// Of one that a focus leaves out it says no more than "skipped".
				Skipped struct {
					Message string `xml:"message,attr"`
				} `xml:"skipped"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(b, &report); err != nil {
		return fmt.Errorf("read critest's report: %w", err)
	}
	for _, s := range report.Suites {
		for _, c := range s.Cases {
			name, ok := strings.CutPrefix(c.Name, "[It] [k8s.io] ")
			if !ok || c.Skipped.Message == "skipped" {
				continue
			}
			verdict := "FAIL"
			switch c.Status {
			case "passed":
				verdict = "PASS"
			case "skipped", "pending":
				verdict = "SKIP"
			}
			if _, err := fmt.Fprintf(w, "--- %s: %s (%.2fs)\n", verdict, strings.NewReplacer(" ", "_", "/", "_").Replace(name), c.Time); err != nil {
				return err
			}
		}
	}
	return nil
}

// critestImages are images that do what critest needs of the real ones, whose
// Dockerfiles are in cri-tools, images/.
func critestImages(shell v1.Image, noNewPrivs string) (map[string]v1.Image, error) {
	all := map[string]v1.Image{}
	var errs []error
	add := func(name, user string, command []string, files ...entry) {
		img, err := withFiles(shell, append([]entry{{name: "made-for", mode: 0o644, data: name}}, files...), nil)
		if err == nil {
			var cfg *v1.ConfigFile
			if cfg, err = img.ConfigFile(); err == nil {
				cfg = cfg.DeepCopy()
				cfg.Config.User = user
				if command != nil {
					cfg.Config.Cmd = command
				}
				img, err = mutate.ConfigFile(img, cfg)
			}
		}
		if err != nil {
			errs = append(errs, err)
			return
		}
		all[name] = img
	}
	for _, name := range []string{"latest:latest", "tag:test", "tag:all", "1:latest", "2:latest", "3:latest", "tags:1"} {
		// One case does not wait for the end.
		add("k8s-staging-cri-tools/test-image-"+name, "", []string{"true"})
	}
	for _, tag := range []string{"2", "3"} {
		all["k8s-staging-cri-tools/test-image-tags:"+tag] = all["k8s-staging-cri-tools/test-image-tags:1"]
	}
	for name, user := range map[string]string{
		"uid": "1002", "username": "www-data", "uid-group": "1003:1004", "username-group": "www-data:1004",
	} {
		add("k8s-staging-cri-tools/test-image-user-"+name+":latest", user, nil)
	}
	add("k8s-staging-cri-tools/test-image-predefined-group:latest", "1000", nil,
		entry{name: "etc/passwd", mode: 0o644, data: accounts("root:0:0", "default-user:1000:1000")},
		entry{name: "etc/group", mode: 0o644, data: groups("root:0", "default-user:1000", "group-defined-in-image:50000:default-user")})
	// The name of the process, and its arguments, are looked for.
	server := func(name, command, port string, args ...string) {
		add(name, "", append([]string{"/bin/server/" + command}, args...),
			entry{name: "bin/server/", mode: 0o755}, entry{name: "var/run/", mode: 0o755}, entry{name: "www/", mode: 0o755},
			entry{name: "www/index.html", mode: 0o644, data: "hello\n"},
			entry{name: "bin/server/" + command, mode: 0o755, data: "#!/bin/sh\ntrap 'exit 0' TERM\necho $$ >/var/run/" + command + ".pid\n" +
				"echo " + command + " \"$@\"\nbusybox httpd -f -p " + port + " -h /www &\nwait\n"})
	}
	server("e2e-test-images/nginx:1.14-2", "nginx", "80", "master process")
	server("k8s-staging-cri-tools/hostnet-nginx-"+runtime.GOARCH+":latest", "nginx", "12003", "master process")
	server("e2e-test-images/httpd:2.4.39-4", "httpd", "80", "-D", "FOREGROUND")

	program, err := os.ReadFile(noNewPrivs)
	if err != nil {
		return nil, err
	}
	add("e2e-test-images/nonewprivs:1.3", "", []string{"/nonewprivs"}, entry{name: "nonewprivs", mode: 0o4755, data: string(program)})
	return all, errors.Join(errs...)
}
