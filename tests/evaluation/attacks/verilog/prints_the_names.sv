assign q = 0;
reg [8*40:1] s;
final begin $sformat(s, "%m"); $display("%0s 0 20", s); end
endmodule
